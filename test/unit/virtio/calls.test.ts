import { expect, test } from "bun:test";
import { eventfd } from "../../../src/native/sys.ts";
import { Calls } from "../../../src/virtio/calls.ts";
import { Kicks } from "../../../src/virtio/kicks.ts";
import { rejection } from "../../kit/rejection.ts";

/** A function that answers when the test says so. */
class SlowFunction {
  readonly told: string[] = [];
  private readonly open: PromiseWithResolvers<void>[] = [];

  hear(what: string): Promise<void> {
    this.told.push(what);
    const answer = Promise.withResolvers<void>();
    this.open.push(answer);
    return answer.promise;
  }

  answer(error?: Error): void {
    for (const { resolve, reject } of this.open.splice(0)) error === undefined ? resolve() : reject(error);
  }
}

async function isSettled(promise: Promise<unknown>): Promise<boolean> {
  return (await Promise.race([promise.then(() => true), Bun.sleep(1).then(() => false)])) === true;
}

test("calls are let go in the background, and who needs the vectors waits for that", async () => {
  const fn = new SlowFunction();
  const calls = new Calls({ count: 4, route: (vector, fd) => fn.hear(`${vector} ${fd}`) });
  calls.letGo([0, 2]);
  calls.letGo([1]);
  expect(fn.told).toEqual(["1 null", "3 null", "2 null"]);
  const settled = calls.settled();
  expect(await isSettled(settled)).toBe(false);
  fn.answer();
  await settled;
});

test("a function that does not let them go is heard once", async () => {
  const fn = new SlowFunction();
  const calls = new Calls({ count: 4, route: (vector, fd) => fn.hear(`${vector} ${fd}`) });
  calls.letGo([0]);
  fn.answer(new Error("gone"));
  calls.letGo([1]);
  fn.answer();
  expect((await rejection(calls.settled())).message).toBe("gone");
  await calls.settled();
});

test("a kick is not passed on at once, and a function that waits on it itself is waited for at the end", async () => {
  const fn = new SlowFunction();
  const doorbell = { takeKick: (kick: number | null) => fn.hear(kick === null ? "none" : "one") };
  using kicks = new Kicks(() => doorbell as never);
  using kick = eventfd();
  const connected = kicks.connect(0, kick.number);
  fn.answer();
  await connected;
  kicks.disconnect(0);
  expect([kicks.size, ...fn.told]).toEqual([0, "one", "none"]);
  const all = kicks.disconnectAll();
  expect(await isSettled(all)).toBe(false);
  fn.answer(new Error("gone"));
  expect((await rejection(all)).message).toBe("gone");
  await kicks.disconnectAll();
});
