import { expect, test } from "bun:test";
import { announcesBoot } from "../../kit/guest/guest.ts";

const READY = "ready 0b8bd1a1-6a2c-4d52-9f4e-3c0f5e1a7b90";

test("a boot is seen, also where a reset has cut an answer in the middle of its line", () => {
  expect(announcesBoot(READY)).toBe(true);
  expect(announcesBoot(`12 0 cmVhZHkg${READY}`)).toBe(true);
  expect(announcesBoot(`1${READY}`)).toBe(true);
});

test("an answer is no boot", () => {
  for (const line of ["", "12 0 cmVhZHkgYQ==", "ready", `${READY} 1`]) expect(announcesBoot(line)).toBe(false);
});
