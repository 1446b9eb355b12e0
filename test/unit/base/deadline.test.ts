import { describe, expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { VhostdError } from "../../../src/base/errors.ts";
import { OperationQueue } from "../../../src/base/operation-queue.ts";
import { rejection } from "../../kit/rejection.ts";

describe("Deadline", () => {
  test("names what was waited for and carries ETIMEDOUT", async () => {
    const never = new Promise<never>(() => {});
    const error = await Deadline.after(5, "reset of the device")
      .race(never)
      .catch((e: unknown) => e);
    expect(error).toBeInstanceOf(VhostdError);
    expect((error as VhostdError).message).toBe("reset of the device did not end within 5 ms");
    expect((error as VhostdError).number).toBe(110);
  });

  test("hands through the result and the failure of what it waits for", async () => {
    const deadline = Deadline.after(10_000, "x");
    expect(await deadline.race(Promise.resolve(7))).toBe(7);
    expect((await rejection(deadline.race(Promise.reject(new Error("broken"))))).message).toContain("broken");
  });

  test("polls until there is an answer, and no longer than the deadline", async () => {
    let asked = 0;
    expect(await Deadline.after(10_000, "x").poll(() => (++asked === 3 ? "yes" : undefined), 1)).toBe("yes");
    expect(asked).toBe(3);
    expect((await rejection(Deadline.after(5, "status 0").poll(() => undefined, 1))).message).toContain(
      "status 0 did not end",
    );
  });
});

describe("OperationQueue", () => {
  test("runs one after the other, in order, past a failure", async () => {
    const queue = new OperationQueue();
    const log: string[] = [];
    const slow = queue.run(async () => {
      log.push("a begins");
      await Bun.sleep(2);
      log.push("a ends");
    });
    const failing = queue.run(async () => {
      log.push("b");
      throw new Error("b failed");
    });
    const last = queue.run(async () => {
      log.push("c");
      return "c";
    });
    expect(queue.length).toBe(3);
    expect((await rejection(failing)).message).toContain("b failed");
    expect(await last).toBe("c");
    await slow;
    expect(log).toEqual(["a begins", "a ends", "b", "c"]);
    expect(queue.length).toBe(0);
  });
});

test("a deadline that is shortened ends what waits already, and is never lengthened", async () => {
  const deadline = Deadline.after(60_000, "a long wait");
  const waits = deadline.race(new Promise(() => {}));
  deadline.shorten(90_000);
  expect(deadline.remaining).toBeGreaterThan(50_000);
  deadline.shorten(5);
  expect(await rejection(waits)).toMatchObject({ code: "timedOut" });
  expect(deadline.remaining).toBeLessThan(5);

  const whole = Deadline.after(60_000, "a long wait");
  const part = whole.before(1_000);
  expect(whole.remaining - part.remaining).toBeGreaterThan(990);
  const partWaits = part.race(new Promise(() => {}));
  whole.shorten(1_005);
  expect(await rejection(partWaits)).toMatchObject({ code: "timedOut" });
  expect(whole.expired).toBe(false);
});
