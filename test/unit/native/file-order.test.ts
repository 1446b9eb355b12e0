import { expect, test } from "bun:test";
import { compareFiles } from "../../../src/native/file-order.ts";
import { eventfd, memfd, socketPair } from "../../../src/native/sys.ts";
import { rejection } from "../../kit/rejection.ts";
import { holdFds } from "./open-fds.ts";

holdFds();

test("fds of one open file are the same, and all others have an order", async () => {
  using one = eventfd();
  using other = eventfd();
  using again = one.dup();
  using memory = memfd("memory", 4096);
  const [left, right] = socketPair();
  using _left = left;
  using _right = right;
  expect(compareFiles(one.number, again.number)).toBe(0);
  expect(compareFiles(one.number, one.number)).toBe(0);
  const files = [one, other, memory, left, right].map(({ number }) => number);
  files.sort(compareFiles);
  for (const [place, file] of files.entries()) {
    for (const later of files.slice(place + 1)) {
      expect(compareFiles(file, later)).toBe(-1);
      expect(compareFiles(later, file)).toBe(1);
    }
  }
  expect(await rejection((async () => compareFiles(one.number, 1_000_000))())).toMatchObject({ errno: 9 });
});
