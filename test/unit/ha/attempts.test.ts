import { describe, expect, test } from "bun:test";
import { silentLogger } from "../../../src/base/log.ts";
import { Attempts } from "../../../src/daemon/ha/attempts.ts";
import { liveFds } from "../../../src/native/fd.ts";
import { eventfd, memfd, pwrite } from "../../../src/native/sys.ts";
import { MemoryKeeper } from "../../kit/memory-keeper.ts";
import { rejection } from "../../kit/rejection.ts";

const open = (keeper: MemoryKeeper, ...keys: string[]) => Attempts.open(keeper, keys, silentLogger);
const never = () => new Promise<never>(() => {});
const nothing = async () => {};

describe("what processes have died of", () => {
  test("is counted by record and stage, for the next ones; what was done is not", async () => {
    const before = liveFds();
    {
      using keeper = new MemoryKeeper();
      for (let deaths = 0; deaths < 3; deaths++) {
        using attempts = await open(keeper, "vf/a", "vf/b");
        expect(attempts.deaths("open", "vf/a")).toBe(0);
        expect(attempts.deaths("take up", "vf/a")).toBe(deaths);
        await attempts.during("open", "vf/a", nothing);
        await rejection(attempts.during("take up", "vf/b", () => Promise.reject(new Error("it does not fit"))));
        void attempts.during("take up", "vf/a", never);
      }
      // Another order, and others beside them.
      using attempts = await open(keeper, "pf/c", "vf/b", "vf/a");
      expect(attempts.deaths("take up", "vf/b")).toBe(0);
      expect(attempts.deaths("take up", "pf/c")).toBe(0);
      await attempts.during("open", "vf/a", nothing);
      let tried = false;
      const again = attempts.during("take up", "vf/a", async () => {
        tried = true;
      });
      expect(await rejection(again)).toMatchObject({
        message: "the daemon has died 3 times in a row while it took up vf/a",
        fix: expect.stringContaining("report it"),
      });
      expect(tried).toBe(false);
      await attempts.close(keeper);
      expect(keeper.keys).toEqual([]);
    }
    expect(liveFds()).toBe(before);
  });

  test("does not count processes that end in order, and keeps what was counted before", async () => {
    using keeper = new MemoryKeeper();
    {
      using attempts = await open(keeper, "vf/a", "vf/b");
      void attempts.during("take up", "vf/a", never);
    }
    for (let round = 0; round < 4; round++) {
      using attempts = await open(keeper, "vf/a", "vf/b");
      for (const key of ["vf/a", "vf/b"]) void attempts.during("take up", key, never);
      attempts.withdraw();
    }
    using attempts = await open(keeper, "vf/a", "vf/b");
    expect(["vf/a", "vf/b"].map((key) => attempts.deaths("take up", key))).toEqual([1, 0]);
    await attempts.during("take up", "vf/a", nothing);
    using next = await open(keeper, "vf/a", "vf/b");
    expect(next.deaths("take up", "vf/a")).toBe(0);
  });

  test("is nothing where it cannot be understood, or nothing is there", async () => {
    using event = eventfd();
    using short = memfd("short", 1);
    pwrite(short.number, Uint8Array.of(3), 0);
    const damages: readonly (readonly [unknown, number | undefined])[] = [
      [{ keys: 7 }, short.number],
      [{ keys: ["vf/a"] }, undefined],
      [{ keys: ["vf/a"] }, short.number],
      [{ keys: ["vf/a"] }, event.number],
    ];
    const before = liveFds();
    for (const [record, fd] of damages) {
      using keeper = new MemoryKeeper();
      const fds = new Map(fd === undefined ? [] : [["page", fd]]);
      await keeper.put("adoption", () => ({ record: record as never, fds }));
      using attempts = await open(keeper, "vf/a");
      expect(attempts.deaths("open", "vf/a")).toBe(0);
      await attempts.during("open", "vf/a", nothing);
    }
    using keeper = new MemoryKeeper();
    using none = await open(keeper);
    await none.during("open", "vf/a", nothing);
    expect(keeper.keys).toEqual([]);
    expect(liveFds()).toBe(before);
  });
});
