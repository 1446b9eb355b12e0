import { expect, test } from "bun:test";
import type { ForwardedRequest } from "../../../src/native/ring-engine.ts";
import type { SoftRequest } from "../../../src/plugin.ts";
import { RequestService } from "../../../src/softvf/request-service.ts";

/** A class that answers with the bytes it was given and an exclamation mark, when it is told to. */
function rig() {
  const answers = new Map<number, string>();
  const failures: string[] = [];
  const held: (() => void)[] = [];
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
  const service = new RequestService({
    serve: async ({ readable }: SoftRequest) => {
      await new Promise<void>((resolve) => held.push(resolve));
      if (text(readable) === "bad") throw new Error("no such thing");
      if (text(readable) === "odd") return undefined as unknown as Uint8Array;
      return new TextEncoder().encode(`${text(readable)}!`);
    },
    fail: (reason) => void failures.push(reason),
  });
  const take = (...requests: readonly (readonly [number, string])[]) => {
    const taken = requests.map(
      ([id, words]): ForwardedRequest => ({ id, queue: 1, readable: new TextEncoder().encode(words), writable: 9 }),
    );
    service.serve({ takeRequests: () => taken, answer: (id, bytes) => void answers.set(id, text(bytes)) });
  };
  const finish = async (index: number) => {
    held[index]!();
    await Bun.sleep(0);
  };
  return { service, answers, failures, take, finish };
}

test("requests are served side by side and answered as they are ready", async () => {
  const { answers, failures, take, finish } = rig();
  take([1, "one"], [2, "two"]);
  await finish(1);
  expect([...answers]).toEqual([[2, "two!"]]);
  await finish(0);
  expect([...answers]).toEqual([
    [2, "two!"],
    [1, "one!"],
  ]);
  expect(failures).toEqual([]);
});

test("what goes wrong fails the device, with the queue and the reason", async () => {
  const { answers, failures, take, finish } = rig();
  take([1, "bad"], [2, "odd"]);
  await finish(0);
  await finish(1);
  expect(failures).toEqual([
    "a request of queue 1 failed: no such thing",
    "a request of queue 1 failed: it was answered with undefined, not with bytes",
  ]);
  expect(answers.size).toBe(0);
});

test("after a reset nobody is told of what came before", async () => {
  const { service, answers, failures, take, finish } = rig();
  take([1, "one"], [2, "bad"]);
  service.forget();
  await finish(0);
  await finish(1);
  take([3, "three"]);
  await finish(2);
  expect([...answers]).toEqual([[3, "three!"]]);
  expect(failures).toEqual([]);
});
