import { expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { KernelCalls } from "../../../src/pci/vfio/kernel-calls.ts";
import { rejection } from "../../kit/rejection.ts";

function never(): void {
  throw new Error("was not late");
}

test("a call that ends in time gives its result, or its error", async () => {
  const calls = new KernelCalls();
  const deadline = Deadline.after(10_000, "call");
  expect(await calls.run(deadline, async () => 7, never)).toBe(7);
  expect((await rejection(calls.run(deadline, () => Promise.reject(new Error("no")), never))).message).toBe("no");
  await calls.idle();
});

test("what a call brings too late is handed to who undoes it, and is awaited by who comes next", async () => {
  const calls = new KernelCalls();
  const { promise, resolve } = Promise.withResolvers<number>();
  const undone: number[] = [];
  const undo = async (value: number) => {
    await Bun.sleep(1);
    undone.push(value);
  };
  expect(await rejection(calls.run(Deadline.after(1, "call"), () => promise, undo))).toMatchObject({
    code: "timedOut",
  });
  const idle = calls.idle();
  resolve(7);
  await idle;
  expect(undone).toEqual([7]);
});

test("a call that fails too late has nothing to be undone; none is made after the deadline", async () => {
  const calls = new KernelCalls();
  const { promise, reject } = Promise.withResolvers<number>();
  await rejection(calls.run(Deadline.after(1, "call"), () => promise, never));
  reject(new Error("late"));
  await calls.idle();
  let made = false;
  const call = async () => {
    made = true;
  };
  expect(await rejection(calls.run(Deadline.after(0, "call"), call, never))).toMatchObject({ code: "timedOut" });
  expect(made).toBe(false);
});
