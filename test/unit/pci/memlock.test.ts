import { expect, test } from "bun:test";
import { memlockError, ownMemlockError, parseLockedMemory } from "../../../src/pci/vfio/memlock.ts";

const MiB = 2 ** 20;
const LIMITS = `Limit                     Soft Limit           Hard Limit           Units     
Max open files            20000                20000                files     
Max locked memory         8388608              16777216             bytes     
`;
const STATUS = "Name:\tbun\nVmLck:\t    4096 kB\nVmPin:\t    1024 kB\nCapEff:\t0000000000000000\n";

test("limit, what is locked and the exemption are read as proc(5) has them", () => {
  expect(parseLockedMemory(LIMITS, STATUS)).toEqual({ limit: 8 * MiB, locked: 4 * MiB, exempt: false });
  const pinned = STATUS.replace("1024 kB", "6144 kB").replace("0000000000000000", "0000000000004000");
  expect(parseLockedMemory(LIMITS, pinned)).toEqual({ limit: 8 * MiB, locked: 6 * MiB, exempt: true });
  const unlimited = LIMITS.replace("8388608 ", "unlimited");
  expect(parseLockedMemory(unlimited, STATUS)?.limit).toBe(Number.POSITIVE_INFINITY);
  expect(parseLockedMemory("", STATUS)).toBeUndefined();
  expect(parseLockedMemory(LIMITS, "")).toBeUndefined();
});

test("the error has limit, what is locked, what was wanted, and what to do", () => {
  const error = memlockError({ limit: 8 * MiB, locked: 4 * MiB, exempt: false }, 64 * MiB, undefined);
  expect(error).toMatchObject({ code: "outOfMemory", data: { limit: 8 * MiB, locked: 4 * MiB, wanted: 64 * MiB } });
  expect(error?.message).toMatch(/8 MiB; 4 MiB are locked, and 64 MiB/);
  expect(error?.fix).toContain("LimitMEMLOCK=infinity");
});

test("a limit that leaves room, or does not hold, is not the cause", async () => {
  expect(memlockError({ limit: 8 * MiB, locked: 4 * MiB, exempt: false }, 4 * MiB, undefined)).toBeUndefined();
  expect(memlockError({ limit: 8 * MiB, locked: 4 * MiB, exempt: true }, 64 * MiB, undefined)).toBeUndefined();
  expect(await ownMemlockError(0, undefined)).toBeUndefined();
});
