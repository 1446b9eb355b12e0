import { describe, expect, test } from "bun:test";
import type { DeviceClass } from "../../../src/plugin.ts";
import type { ControlQueue } from "../../../src/virtio/control-queue.ts";
import { type DeviceState, withEnabled } from "../../../src/virtio/device-state.ts";
import { encodeDeviceState } from "../../../src/virtio/device-state-codec.ts";
import { VendorMover } from "../../../src/virtio/movers/vendor.ts";
import { rejection } from "../../kit/rejection.ts";
import { wantedState } from "./states.ts";
import { advance, cleanUpAfterEach, type Parts, running, setUp, soon, with_ } from "./vendor-lab.ts";

cleanUpAfterEach();

/** The queue says what it has in flight. */
function list({ vf }: Parts, queue: number, heads: readonly number[]) {
  with_(vf, { inFlight: [{ queue, heads }] });
}

describe("what a class adds to the state", () => {
  test("its fields go into it, made of the configuration space", async () => {
    const stateFields: DeviceClass["stateFields"] = ({ mode }, features) => [
      { type: 4, bytes: Uint8Array.of(Number(mode), Number(features & 0xffn), 0, 0) },
    ];
    const { mover, vf, rings } = await setUp(2, { configSpace: { mode: [3, "u8"] }, stateFields });
    const config = new Uint8Array(60).with(3, 7);
    await mover.configure({ ...wantedState(2), config }, soon());
    expect(vf.restored[0]?.others).toEqual([{ type: 4, bytes: Uint8Array.of(7, 0x40, 0, 0) }]);
    for (const queue of [0, 1]) rings.set(queue, { available: 0, used: 0 });
    await mover.freeze(rings, "drained", soon());
  });

  test("the device goes on with a state where the fields are equal that matter", async () => {
    const configSpace: DeviceClass["configSpace"] = { address: [0, "u48"], hint: [6, "u16"] };
    const wantedWith = (state: DeviceState, at: number) => ({ ...state, config: state.config.with(at, 0xee) });
    const continues = async (comparedConfig: DeviceClass["comparedConfig"] | undefined, at: number) => {
      const members = comparedConfig === undefined ? { configSpace } : { configSpace, comparedConfig };
      const { mover, vf, rings } = await running(2, 7, members);
      const state = await mover.freeze(rings, "drained", soon());
      await mover.configure(wantedWith(state, at), soon());
      return vf.restored.length === 1;
    };
    expect(await continues(() => ["address"], 6)).toBe(true);
    expect(await continues(() => ["address"], 5)).toBe(false);
    expect(await continues((features) => (features === 1n << 32n ? ["hint"] : []), 6)).toBe(false);
    expect(await continues(undefined, 6)).toBe(false);
  });
});

describe("receive queues", () => {
  const receives: DeviceClass["receives"] = (queue) => queue === 0;

  test("take once more what waits in them: heads that are the next of the ring, or none listed", async () => {
    for (const heads of [[], [9, 4, 7]]) {
      const parts = await running(2, 0xfffe, { receives });
      advance(parts, 0, 1, 0xfffe);
      parts.rings.setHeads(0, 0xfffe, [4, 9, 7]);
      if (heads.length > 0) list(parts, 0, heads);
      const { queues } = await parts.mover.freeze(parts.rings, "drained", soon());
      expect(queues[0]).toEqual({ ...queues[0]!, lastAvail: 0xfffe, lastUsed: 0xfffe });
      expect(queues[0]).not.toHaveProperty("inFlight");
      // It holds what was there before: everything is written, so that it looks at the ring again.
      await parts.mover.configure({ ...wantedState(2, 0xfffe), queues }, soon());
      expect(parts.vf.restored.at(-1)?.indices[0]).toEqual({ index: 0, lastAvail: 0xfffe, lastUsed: 0xfffe });
      expect(parts.vf.restored.at(-1)?.inFlight).toEqual([]);
    }
  });

  test("are drained like others where the heads are others, or some are completed", async () => {
    const parts = await running(2, 5, { receives });
    advance(parts, 0, 8, 5);
    parts.rings.setHeads(0, 5, [4, 9, 7]);
    list(parts, 0, [4, 9, 8]);
    expect((await rejection(parts.mover.freeze(parts.rings, "drained", soon(250)))).message).toMatch(
      /queue 0 has 3 buffers in use/,
    );
    list(parts, 0, [4, 9, 7]);
    with_(parts.vf, { completed: [{ queue: 0, heads: [4] }] });
    expect((await rejection(parts.mover.freeze(parts.rings, "drained", soon(250)))).message).toMatch(
      /1 completed buffers/,
    );
  });

  test("that stopped with such a list go on with it", async () => {
    const parts = await running(2, 5, { receives });
    advance(parts, 0, 8, 5);
    list(parts, 0, [4, 9, 8]);
    const state = await parts.mover.freeze(parts.rings, "listed", soon());
    expect(state.queues[0]).toMatchObject({ lastAvail: 8, lastUsed: 5, inFlight: [4, 9, 8] });
    await parts.mover.configure(state, soon());
    expect(parts.vf.restored.length).toBe(1);
  });

  test("of a stopped device may take buffers, others may not", async () => {
    const frozen = async () => {
      const parts = await running(2, 5, { receives });
      const state = await parts.mover.freeze(parts.rings, "drained", soon());
      await parts.mover.manual.change("running", soon());
      return { ...parts, state };
    };
    const first = await frozen();
    advance(first, 0, 8, 5);
    await first.mover.configure(first.state, soon());
    const second = await frozen();
    advance(second, 1, 6, 6);
    expect((await rejection(second.mover.configure(second.state, soon()))).message).toMatch(/went on/);
  });
});

describe("queues in use", () => {
  test("the others are set up, not enabled, and stand where they were", async () => {
    const { mover, vf, rings } = await setUp(2);
    await mover.configure(withEnabled(wantedState(2, 5), new Set([0])), soon());
    expect(vf.restored[0]?.queues.map(({ enable, size }) => [enable, size])).toEqual([
      [1, 128],
      [0, 128],
    ]);
    expect(vf.restored[0]?.indices[1]).toEqual({ index: 1, lastAvail: 5, lastUsed: 5 });
    advance({ vf, rings }, 0, 9, 9);
    // What a device saves of a queue that it does not use means nothing, nor what the guest does with it.
    advance({ vf, rings }, 1, 0, 0, 77);
    const state = await mover.freeze(rings, "drained", soon());
    expect(state.queues.map(({ lastAvail, disabled }) => [lastAvail, disabled])).toEqual([
      [9, undefined],
      [5, true],
    ]);
  });

  test("change while it runs: frozen, written anew and running again", async () => {
    const parts = await running(2, 5);
    const { mover, vf, rings, fn } = parts;
    advance(parts, 0, 9, 7);
    list(parts, 0, [3, 4]);
    await mover.enable(new Set([0]), rings, soon());
    expect(vf.steps).toEqual(["quiesced", "freezed", "quiesced", "running"]);
    expect(vf.restored.at(-1)).toMatchObject({
      queues: [{ enable: 1 }, { enable: 0 }],
      indices: [
        { lastAvail: 9, lastUsed: 7 },
        { lastAvail: 5, lastUsed: 5 },
      ],
      inFlight: [{ queue: 0, heads: [3, 4] }],
    });
    expect(fn.status).toBe(0xf);
    expect(mover.snapshot()).toMatchObject({ kind: "running", state: { queues: [{}, { disabled: true }] } });
    vf.steps.length = 0;
    await mover.enable(new Set([0]), rings, soon());
    expect(vf.steps).toEqual([]);
    await mover.enable(new Set([0, 1]), rings, soon());
    expect(vf.restored.at(-1)?.queues.map(({ enable }) => enable)).toEqual([1, 1]);
  });

  test("a queue gives back what it has taken before it is not used any more, or the device goes on as it was", async () => {
    const parts = await running(2, 5);
    const { mover, vf, rings } = parts;
    advance(parts, 1, 9, 7);
    list(parts, 1, [3, 4]);
    expect(await rejection(mover.enable(new Set([0]), rings, soon(250)))).toMatchObject({
      code: "timedOut",
      message: expect.stringMatching(/queue 1 has 2 buffers in use/),
    });
    expect(vf.status).toBe("running");
    expect(vf.restored.length).toBe(1);
    expect(mover.snapshot()).toMatchObject({ kind: "running", state: { queues: wantedState(2, 5).queues } });
    with_(vf, { inFlight: [] });
    advance(parts, 1, 9, 9);
    await mover.enable(new Set([0]), rings, soon());
    expect(vf.restored.length).toBe(2);
  });

  test("change under the hands of an operator, who goes on holding the device", async () => {
    for (const held of ["quiesced", "freezed"] as const) {
      const parts = await running(2, 5);
      const { mover, vf, rings } = parts;
      await mover.manual.change(held, soon());
      await mover.enable(new Set([0]), rings, soon());
      expect(vf.restored.at(-1)?.queues.map(({ enable }) => enable)).toEqual([1, 0]);
      advance(parts, 0, 9, 7);
      // Heads that are not listed cannot be written back.
      expect(await rejection(mover.enable(new Set([1]), rings, soon(250)))).toMatchObject({ code: "timedOut" });
      expect(vf.status).toBe(held);
      expect(vf.steps).not.toContain("running");
      await mover.manual.change("running", soon());
      expect(mover.snapshot()).toMatchObject({ kind: "running", state: { queues: [{}, { disabled: true }] } });
    }
  });

  test("the function's own control queue is none of them, also where the registers have set it up", async () => {
    // A device with three queues in use, the last one its own.
    const { host, managed, vf, rings } = await running(3, 5);
    const control = { index: 2 } as ControlQueue;
    const state = encodeDeviceState(wantedState(2, 5));
    const mover = new VendorMover({ ...host, control: () => control }, managed, { kind: "running", state });
    await mover.freeze(rings, "drained", soon());
    await mover.configure(wantedState(2, 6), soon());
    expect(vf.restored.at(-1)?.queues.map(({ enable }) => enable)).toEqual([1, 1, 0]);
  });

  test("a device that is not running is left alone", async () => {
    const { mover, vf, rings } = await setUp(2);
    expect(await rejection(mover.enable(new Set([0]), rings, soon()))).toMatchObject({ code: "invalid" });
    expect(vf.steps).toEqual([]);
  });

  test("one that does not take them ends reset", async () => {
    const { mover, pf, rings, fn } = await running(2, 5);
    pf.answer = (asked) => (asked.name === "restore" ? { status: 0x85 } : pf.honest(asked));
    expect((await rejection(mover.enable(new Set([0]), rings, soon()))).message).toMatch(/restore/);
    expect(fn.status).toBe(0);
    expect(mover.snapshot()).toEqual({ kind: "reset" });
  });

  test("without the admin queue it is the registers' matter", async () => {
    const { mover, pf, rings } = await running(2, 5);
    pf.complete(0xffff);
    await soon().poll(() => mover.capabilities.resumeAnywhere === false || undefined, 1);
    await mover.enable(new Set([1]), rings, soon());
    expect(mover.snapshot()).toMatchObject({ kind: "running", state: { queues: [{ disabled: true }, {}] } });
  });

  test("those that were not restored nobody can enable then", async () => {
    const { mover, pf, rings } = await setUp(2);
    await mover.configure(withEnabled(wantedState(2, 5), new Set([0])), soon());
    pf.complete(0xffff);
    await soon().poll(() => mover.capabilities.resumeAnywhere === false || undefined, 1);
    expect(await rejection(mover.enable(new Set([0, 1]), rings, soon()))).toMatchObject({
      code: "notSupported",
      message: expect.stringMatching(/queue 1 cannot be enabled: .*the device broke the ring/),
    });
  });
});
