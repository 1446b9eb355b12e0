import { afterAll, beforeAll, expect, test } from "bun:test";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { memfd, pwrite } from "../../../src/native/sys.ts";
import { claimRoom } from "../../../src/pci/vfio/room.ts";
import { rejection } from "../../kit/rejection.ts";

const GiB = 2 ** 30;
let directory: string;
beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), "room-"));
});
afterAll(() => rm(directory, { recursive: true }));

/** A machine with so much memory left. */
async function left(bytes: number): Promise<string> {
  const path = join(directory, "meminfo");
  await Bun.write(path, `MemTotal: 99 kB\nMemAvailable:   ${bytes / 1024} kB\n`);
  return path;
}

test("a file of holes is refused where it would take the machine's memory, also together with others", async () => {
  using file = memfd("holes", 64 * GiB);
  const meminfo = await left(80 * GiB);
  expect(await rejection(claimRoom(file.number, 64 * GiB, await left(64 * GiB)))).toMatchObject({
    code: "outOfMemory",
    message: expect.stringMatching(/68719476736 bytes of it/),
  });
  await left(80 * GiB);
  {
    using _first = await claimRoom(file.number, 64 * GiB, meminfo);
    expect(await rejection(claimRoom(file.number, 64 * GiB, meminfo))).toMatchObject({ code: "outOfMemory" });
    using _small = await claimRoom(file.number, GiB, meminfo);
  }
  using _again = await claimRoom(file.number, 64 * GiB, meminfo);
});

test("what is in memory already needs no room", async () => {
  using file = memfd("full", 1 << 20);
  pwrite(file.number, new Uint8Array(1 << 20).fill(1), 0);
  using _room = await claimRoom(file.number, 1 << 20, await left(0));
});
