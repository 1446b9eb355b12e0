import { afterEach, describe, expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { duplicate, liveFds } from "../../../src/native/fd.ts";
import { eventfd } from "../../../src/native/sys.ts";
import type { ControlCommand } from "../../../src/plugin.ts";
import { ControlQueue } from "../../../src/virtio/control-queue.ts";
import { FakeControl, type FakeControlAnswer } from "../../kit/fake-control.ts";
import { FakeFunction } from "../../kit/fake-function.ts";
import { rejection } from "../../kit/rejection.ts";
import { moverHost } from "./mover-host.ts";

const QUEUE = 4;
const soon = (ms = 1000) => Deadline.after(ms, "the test");
const undo: Disposable[] = [];

afterEach(() => {
  for (const one of undo.splice(0).reverse()) one[Symbol.dispose]();
  expect(liveFds()).toBe(0);
});

/** A device that runs with its control queue. */
async function open(queueSize = 256) {
  const fn = new FakeFunction({ queues: QUEUE + 1, queueSize });
  const fake = new FakeControl(fn, QUEUE);
  const { device, limits, ringDoorbell } = await moverHost(fn);
  const place = { address: fn.address, ringDoorbell };
  const control = await ControlQueue.open(place, QUEUE, limits, fake.domain, "control");
  undo.push(fake, control);
  const begin = async () => {
    await device.reset(soon());
    await device.setUpQueues(0, [control.begin()]);
    await device.run();
  };
  await begin();
  return { fn, fake, place, control, begin, limits };
}

function command(value: number, size = 3): ControlCommand {
  const request = new Uint8Array(size).fill(value);
  return { name: `SET_${value}`, request, answerSize: 1, accepted: ([code]) => code === 0 };
}

describe("commands", () => {
  test("reach the device, one after the other, round the ring and after a reset", async () => {
    for (const queueSize of [2, 256]) {
      const { fn, fake, control, begin } = await open(queueSize);
      expect(fn.queues[QUEUE]).toMatchObject({ size: Math.min(queueSize, 64), enable: 1, vector: 0xffff });
      for (let value = 1; value <= 5; value++) expect(await control.command(command(value), soon())).toBe(true);
      await begin();
      expect(await control.command(command(6, 1024), soon())).toBe(true);
      expect(fake.seen.map(([first]) => first)).toEqual([1, 2, 3, 4, 5, 6]);
      expect(fake.seen.map(({ length }) => length)).toEqual([3, 3, 3, 3, 3, 1024]);
      expect(fn.rung).toEqual(Array.from({ length: 6 }, () => QUEUE));
    }
  });

  test("may be refused, which their class decides by the answer", async () => {
    const { fake, control } = await open();
    fake.answer = (_, honest) => ({ ...honest, bytes: Uint8Array.of(1) });
    expect(await control.command(command(7), soon())).toBe(false);
    fake.answer = (_, honest) => honest;
    expect(await control.command(command(8), soon())).toBe(true);
  });

  test("that are not answered end with their deadline; the next one waits for both", async () => {
    const { fake, control } = await open();
    fake.answer = () => undefined;
    expect(await rejection(control.command(command(1), soon(20)))).toMatchObject({
      code: "timedOut",
      message: expect.stringMatching(/has not answered SET_1 on its control queue/),
    });
    fake.answer = (_, honest) => honest;
    expect(await rejection(control.command(command(2), soon(20)))).toMatchObject({ code: "timedOut" });
    expect(fake.seen.length).toBe(1);
    fake.ring.complete(0, 1);
    expect(await control.command(command(3), soon())).toBe(true);
    expect(fake.seen.map(([first]) => first)).toEqual([1, 3]);
  });

  test("that have no room are refused", async () => {
    const { fake, control } = await open();
    for (const wrong of [command(1, 0), command(1, 1025), { ...command(1), answerSize: 0 }]) {
      expect(await rejection(control.command(wrong, soon()))).toMatchObject({ code: "invalid" });
    }
    expect(fake.seen).toEqual([]);
  });
});

describe("what the device writes is not trusted", () => {
  const lies: [string, (honest: FakeControlAnswer, fake: FakeControl) => FakeControlAnswer | undefined, RegExp][] = [
    ["another descriptor", (honest) => ({ ...honest, id: 5 }), /on SET_1 it gave back descriptor 5 instead of 0/],
    ["a short answer", (honest) => ({ ...honest, length: 0 }), /wrote 0 bytes of an answer of 1/],
    [
      "a used index beyond what there is",
      (_, { ring }) => void ring.setUsedIndex(9),
      /used index 9 with 1 commands made available/,
    ],
  ];
  test.each(lies)("%s", async (_, lie, message) => {
    const { fake, control } = await open();
    fake.answer = (_request, honest) => lie(honest, fake);
    const refused = control.command(command(1), soon());
    expect(await rejection(refused)).toMatchObject({ code: "io", message: expect.stringMatching(message) });
  });
});

describe("another process", () => {
  test("goes on with the queue, also where a command is in flight", async () => {
    const { fake, place, control } = await open();
    await control.command(command(1), soon());
    fake.answer = () => undefined;
    await rejection(control.command(command(2), soon(5)));
    const { data, fd } = control.snapshot();
    const revived = ControlQueue.revive(place, JSON.parse(JSON.stringify(data)), duplicate(fd));
    undo.push(revived);
    control[Symbol.dispose]();
    expect(await rejection(revived.command(command(3), soon(5)))).toMatchObject({ code: "timedOut" });
    fake.answer = (_, honest) => honest;
    fake.ring.complete(0, 1);
    expect(await revived.command(command(4), soon())).toBe(true);
    expect(fake.seen.map(([first]) => first)).toEqual([1, 2, 4]);
  });

  test("does not believe its record", async () => {
    const { place, control } = await open();
    const { data, fd } = control.snapshot();
    using copy = duplicate(fd);
    expect(() => ControlQueue.revive(place, { ...data, ringSize: 3 }, copy)).toThrow(/3 entries/);
    using other = eventfd();
    expect(() => ControlQueue.revive(place, data, other)).toThrow(/no memory file/);
  });
});

test("a function without such a queue is refused, and nothing is mapped for it", async () => {
  const { fake, place, limits } = await open();
  for (const [index, sizeMax] of [
    [9, 256],
    [1, 1],
  ] as const) {
    const bent = limits.map((limit) => ({ ...limit, sizeMax }));
    expect(await rejection(ControlQueue.open(place, index, bent, fake.domain, "other"))).toMatchObject({
      code: "probeFailed",
      message: expect.stringMatching(/2 are needed/),
    });
  }
  expect(fake.mapped).toBe(1);
});
