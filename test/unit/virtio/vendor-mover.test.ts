import { describe, expect, test } from "bun:test";
import { InternalStatus } from "../../../src/virtio/admin/vendor.ts";
import { FeatureBit, featureBits } from "../../../src/virtio/features.ts";
import { VendorMover } from "../../../src/virtio/movers/vendor.ts";
import type { FakeAnswer, FakeCommand } from "../../kit/fake-admin.ts";
import { rejection } from "../../kit/rejection.ts";
import { wantedState } from "./states.ts";
import { advance, cleanUpAfterEach, type Parts, running, setUp, soon, with_ } from "./vendor-lab.ts";

cleanUpAfterEach();

const names = (commands: readonly FakeCommand[]) => commands.map(({ name }) => name);

describe("configure", () => {
  test("restores the whole state at any index, and lets the device run", async () => {
    const { mover, vf, fn, host } = await setUp(3);
    const wanted = wantedState(2, 57);
    const [first, second] = wanted.queues;
    const queues = [{ ...first!, lastAvail: 59, inFlight: [8, 3] }, second!];
    await mover.configure({ ...wanted, queues }, soon());
    expect(vf.steps).toEqual(["quiesced", "freezed", "quiesced", "running"]);
    expect(vf.restored.length).toBe(1);
    expect(vf.restored[0]).toMatchObject({
      common: {
        deviceFeatures: host.features,
        driverFeatures: featureBits(FeatureBit.version1),
        configVector: 0,
        numQueues: 3,
        status: 0x0f,
        configGeneration: 0,
      },
      queues: [
        { index: 0, size: 128, vector: 1, enable: 1, notifyOff: 0, desc: 0x1_0000_0000n },
        { index: 1, size: 128, vector: 2, enable: 1, notifyOff: 1, driver: 0x1_0001_4000n, device: 0x1_0001_8000n },
        { index: 2, size: 256, vector: 0xffff, enable: 0, notifyOff: 2, desc: 0n },
      ],
      indices: [
        { index: 0, lastAvail: 59, lastUsed: 57 },
        { index: 1, lastAvail: 57, lastUsed: 57 },
        { index: 2, lastAvail: 0, lastUsed: 0 },
      ],
      inFlight: [{ queue: 0, heads: [8, 3] }],
    });
    expect(fn.statusWrites).toEqual([]);
    expect(fn.rung).toEqual([]);
    expect(mover.snapshot().kind).toBe("running");
    expect(mover.capabilities.resumeAnywhere).toBe(true);
  });

  test("refuses buffers in flight that nobody lists, before it touches the device", async () => {
    const { mover, vf } = await setUp();
    const wanted = wantedState(1);
    const queues = [{ ...wanted.queues[0]!, lastAvail: 9, lastUsed: 7, inFlight: [4] }];
    expect(await rejection(mover.configure({ ...wanted, queues }, soon()))).toMatchObject({
      code: "notSupported",
      message: expect.stringMatching(/available index 9 and used index 7, but 1 of the 2/),
    });
    expect(vf.steps).toEqual([]);
  });

  test.each([
    ["identity", "modifyStatus", /modifyStatus/],
    ["restore", "restore", /restore/],
  ])("leaves a reset device where %s fails", async (_, command, message) => {
    const { mover, pf, fn } = await setUp();
    pf.answer = (asked) => (asked.name === command ? { status: 0x85 } : pf.honest(asked));
    expect((await rejection(mover.configure(wantedState(1), soon()))).message).toMatch(message);
    expect(fn.statusWrites.at(-1)).toBe(0);
    expect(mover.snapshot()).toEqual({ kind: "reset" });
    pf.answer = (asked) => pf.honest(asked);
    await mover.configure(wantedState(1), soon());
    expect(fn.status).toBe(0x0f);
  });

  test("does not believe that a device runs whose status says otherwise", async () => {
    const { mover, pf, fn } = await setUp();
    pf.answer = (asked) => {
      const answer = pf.honest(asked);
      if (fn.status !== 0) fn.status = 0x4f;
      return answer;
    };
    expect(await rejection(mover.configure(wantedState(1), soon()))).toMatchObject({
      code: "io",
      message: expect.stringMatching(/needsReset/),
    });
  });
});

describe("freeze", () => {
  test("returns the indices that the device and the guest's memory agree on", async () => {
    const parts = await running(2, 5);
    advance(parts, 0, 0x10, 0x10);
    advance(parts, 1, 0xfffe, 0xfffe);
    const { queues } = await parts.mover.freeze(parts.rings, "drained", soon());
    expect(queues.map(({ lastAvail, lastUsed }) => [lastAvail, lastUsed])).toEqual([
      [0x10, 0x10],
      [0xfffe, 0xfffe],
    ]);
    expect(parts.vf.steps).toEqual(["quiesced", "freezed"]);
    expect(parts.mover.snapshot().kind).toBe("frozen");
    expect(parts.fn.rung).toEqual([]);
  });

  test("lets the device go on until it has drained, and looks again", async () => {
    const parts = await running(1);
    advance(parts, 0, 9, 7);
    const { pf } = parts;
    pf.answer = (asked) => {
      const answer = pf.honest(asked);
      // It ends what it has taken after it was looked at.
      if (asked.name === "save") advance(parts, 0, 9, 9);
      return answer;
    };
    const { queues } = await parts.mover.freeze(parts.rings, "drained", soon());
    expect(queues[0]).toMatchObject({ lastAvail: 9, lastUsed: 9 });
    expect(parts.vf.steps).toEqual(["quiesced", "freezed", "quiesced", "freezed"]);
    expect(parts.vf.status).toBe("freezed");
  });

  test("does not believe a device that is ahead of the guest's memory", async () => {
    const parts = await running(1);
    advance(parts, 0, 9, 9, 8);
    expect(await rejection(parts.mover.freeze(parts.rings, "listed", soon(250)))).toMatchObject({
      code: "timedOut",
      message: expect.stringMatching(/not written back .* used 9, in the guest's memory 8/),
    });
  });

  test("lists what is in flight where it may, and never guesses", async () => {
    const parts = await running(1);
    advance(parts, 0, 9, 7);
    const { mover, rings, vf } = parts;
    expect(await rejection(mover.freeze(rings, "listed", soon(250)))).toMatchObject({
      code: "timedOut",
      message: expect.stringMatching(/queue 0 has 2 buffers in use and lists 0 of them/),
    });
    vf.state = { ...vf.state!, inFlight: [{ queue: 0, heads: [4, 1] }] };
    expect((await rejection(mover.freeze(rings, "drained", soon(250)))).message).toMatch(
      /queue 0 has 2 buffers in use/,
    );
    const completed = [{ queue: 0, heads: [1] }];
    vf.state = { ...vf.state!, completed };
    expect((await rejection(mover.freeze(rings, "listed", soon(250)))).message).toMatch(/1 completed buffers/);
    vf.state = { ...vf.state!, completed: [] };
    const state = await mover.freeze(rings, "listed", soon());
    expect(state.queues[0]).toMatchObject({ lastAvail: 9, lastUsed: 7, inFlight: [4, 1] });
    await mover.configure(state, soon());
    expect(vf.restored.length).toBe(1);
  });

  test("a guest's memory that is gone is an error", async () => {
    const { mover } = await running(1);
    const gone = {
      read: () => {
        throw new Error("no memory there");
      },
    };
    expect((await rejection(mover.freeze(gone, "drained", soon()))).message).toMatch(/no memory/);
  });

  const lies: [string, (parts: Parts) => void, RegExp][] = [
    [
      "other features",
      ({ vf }) => with_(vf, { common: { ...vf.state!.common, driverFeatures: 1n } }),
      /features 0x1 instead/,
    ],
    ["another status", ({ vf }) => with_(vf, { common: { ...vf.state!.common, status: 0x4f } }), /needsReset/],
    ["a queue less", ({ vf }) => with_(vf, { queues: vf.state!.queues.slice(1) }), /queues \[1\] instead of \[0, 1\]/],
    [
      "another address",
      ({ vf }) => with_(vf, { queues: vf.state!.queues.map((q) => ({ ...q, desc: 1n << 63n })) }),
      /desc/,
    ],
    ["no indices", ({ vf }) => with_(vf, { indices: [] }), /queue 0 has no indices/],
    ["impossible indices", (parts) => advance(parts, 0, 500, 7), /493 buffers in use, of 128/],
    ["impossible heads", ({ vf }) => with_(vf, { inFlight: [{ queue: 0, heads: [128] }] }), /descriptor 128 of 128/],
    ["a head twice", ({ vf }) => with_(vf, { inFlight: [{ queue: 1, heads: [5, 5] }] }), /descriptor 5 .* twice/],
  ];
  test.each(lies)("does not believe %s", async (_, lie, message) => {
    const parts = await running(2);
    lie(parts);
    const refused = parts.mover.freeze(parts.rings, "listed", soon());
    expect(await rejection(refused)).toMatchObject({ code: "io", message: expect.stringMatching(message) });
    expect(parts.mover.snapshot().kind).toBe("running");
  });

  test("says what has not drained where the device does not quiesce before it has", async () => {
    for (const answer of [{ status: 1 }, "silence"] as const) {
      const parts = await running(1);
      advance(parts, 0, 9, 7);
      const deadline = soon(20_000);
      parts.pf.answer = (asked) => {
        if (asked.name !== "modifyStatus") return parts.pf.honest(asked);
        // The time that is kept for saying why is not touched by that.
        deadline.shorten(3000 + 50);
        return answer;
      };
      expect(await rejection(parts.mover.freeze(parts.rings, "drained", deadline))).toMatchObject({
        code: "quiesceFailed",
        message: expect.stringMatching(/modifyStatus of virtfn0: .*: queue 0 has 2 buffers in use/),
      });
    }
  });

  test("says why it did not, where the device refuses", async () => {
    const { mover, pf, rings } = await running(1);
    let refused = "quiesced";
    const codes = { quiesced: 2, freezed: 3 };
    pf.answer = (asked) => {
      const step = asked.name === "modifyStatus" && asked.data[2] === codes[refused as keyof typeof codes];
      return step ? { status: 0x81 } : pf.honest(asked);
    };
    expect(await rejection(mover.freeze(rings, "drained", soon()))).toMatchObject({ code: "quiesceFailed" });
    refused = "freezed";
    expect(await rejection(mover.freeze(rings, "drained", soon()))).toMatchObject({ code: "freezeFailed" });
    refused = "";
    pf.answer = (asked) => (asked.name === "save" ? { status: 0x84 } : pf.honest(asked));
    expect(await rejection(mover.freeze(rings, "drained", soon()))).toMatchObject({ code: "stateSave" });
  });
});

describe("continuing", () => {
  async function frozen() {
    const parts = await running(2);
    for (const queue of [0, 1]) advance(parts, queue, 7, 7);
    const state = await parts.mover.freeze(parts.rings, "drained", soon());
    parts.vf.steps.length = 0;
    return { ...parts, state };
  }

  test("goes on where it stands: nothing is written", async () => {
    const { mover, vf, state } = await frozen();
    await mover.configure(state, soon());
    expect(vf.steps).toEqual(["quiesced", "running"]);
    expect(vf.restored.length).toBe(1);
  });

  test("writes everything for other rings, other indices, or a device that was reset", async () => {
    for (const change of ["rings", "indices", "reset"] as const) {
      const { mover, vf, fn, state } = await frozen();
      if (change === "reset") await fn.region(4).write(20, 1, 0);
      const base = change === "reset" ? 7 : 3;
      const wanted = change === "rings" ? wantedState(1, 7) : { ...state, queues: wantedState(2, base).queues };
      await mover.configure(wanted, soon());
      expect(vf.restored.length).toBe(2);
      expect(fn.status).toBe(0x0f);
    }
  });

  test("survives what an operator does by hand, and notices where the device went on", async () => {
    const { mover, state } = await frozen();
    expect(await mover.manual.status(soon())).toBe("freezed");
    await mover.manual.change("quiesced", soon());
    await mover.configure(state, soon());

    const parts = await frozen();
    await parts.mover.manual.change("running", soon());
    advance(parts, 1, 8, 8);
    expect(await rejection(parts.mover.configure(parts.state, soon()))).toMatchObject({
      code: "io",
      message: expect.stringMatching(/went on while it was stopped: queue 1 lastAvail: 8 \| 7/),
    });
    expect(parts.fn.status).toBe(0);
  });

  test("what went on while it was stopped is never written over", async () => {
    const moves: [(parts: Parts) => void, RegExp][] = [
      [(parts) => advance(parts, 1, 8, 8), /queue 1 lastAvail: 8 \| 7/],
      [
        (parts) => {
          advance(parts, 0, 8, 7);
          with_(parts.vf, { inFlight: [{ queue: 0, heads: [3] }] });
        },
        /queue 0 inFlight: 3 \| none/,
      ],
    ];
    for (const [move, message] of moves) {
      const parts = await frozen();
      await parts.mover.manual.change("running", soon());
      move(parts);
      const { state, vf } = parts;
      const wanted = { ...state, queues: state.queues.slice(0, 1) };
      expect(await rejection(parts.mover.configure(wanted, soon()))).toMatchObject({
        code: "io",
        message: expect.stringMatching(message),
      });
      expect(vf.restored.length).toBe(1);
      expect(parts.fn.status).toBe(0);
    }
  });

  test("a mover made from the snapshot stands where the first one stood", async () => {
    const { mover, vf, host, managed, state } = await frozen();
    const revived = new VendorMover(host, managed, JSON.parse(JSON.stringify(mover.snapshot())));
    await revived.configure(state, soon());
    expect(vf.restored.length).toBe(1);
    expect(
      () =>
        new VendorMover(host, managed, { kind: "frozen", state: { ...revived.snapshot(), features: "x" } as never }),
    ).toThrow(/not understood/);
  });
});

describe("by hand", () => {
  /** The device does not take this status. */
  function refuse({ pf }: Parts, status: number, answer: FakeAnswer) {
    pf.answer = (asked) => {
      const step = asked.name === "modifyStatus" && asked.data[2] === status;
      return step ? answer : pf.honest(asked);
    };
  }

  test("a change that fails half way leaves the VF where it was", async () => {
    const parts = await running(1);
    refuse(parts, InternalStatus.freezed, { status: 0x85 });
    expect(await rejection(parts.mover.manual.change("freezed", soon()))).toMatchObject({ code: "freezeFailed" });
    expect(parts.vf.steps).toEqual(["quiesced", "running"]);
  });

  test("or says where it is", async () => {
    const parts = await setUp(1);
    refuse(parts, InternalStatus.freezed, { status: 0x85 });
    expect(await rejection(parts.mover.manual.change("freezed", soon()))).toMatchObject({
      code: "freezeFailed",
      message: expect.stringMatching(/internal \(code 5\); it was init and is quiesced$/),
    });
    const silent = await running(1);
    refuse(silent, InternalStatus.freezed, "silence");
    expect(await rejection(silent.mover.manual.change("freezed", soon(50)))).toMatchObject({
      code: "freezeFailed",
      message: expect.stringMatching(/; it was running and is quiesced$/),
    });
  });
});

describe("while a command that was never answered may still alter the VF", () => {
  for (const lost of ["modifyStatus", "restore"]) {
    test(`it begins by its registers, at index 0 only: ${lost}`, async () => {
      const { mover, pf, fn, vf, rings } = await setUp(1);
      pf.answer = (asked) => (asked.name === lost ? "silence" : pf.honest(asked));
      expect((await rejection(mover.configure(wantedState(1, 5), soon(50)))).message).toContain(
        `did not answer ${lost}`,
      );
      expect(fn.status).toBe(0);
      pf.answer = (asked) => pf.honest(asked);
      expect(mover.capabilities.resumeAnywhere).toBe(false);
      expect(await rejection(mover.configure(wantedState(1, 5), soon()))).toMatchObject({
        code: "notSupported",
        message: expect.stringMatching(/resume at index 5, .*may still alter virtfn0/),
        fix: expect.stringMatching(/reboot/),
      });
      expect(await rejection(mover.manual.change("quiesced", soon()))).toMatchObject({ code: "busy" });
      const restored = vf.restored.length;
      await mover.configure(wantedState(1), soon());
      expect(fn.status).toBe(0x0f);
      expect(vf.restored.length).toBe(restored);

      // Answered at last: from then on as ever.
      pf.complete(pf.commands(lost as "restore")[0]!.head);
      await soon().poll(() => mover.capabilities.resumeAnywhere || undefined, 1);
      expect(mover.snapshot().kind).toBe("running");
      await mover.reset(soon());
      await mover.configure(wantedState(1, 5), soon());
      expect(vf.restored.length).toBe(restored + 1);
      advance({ vf, rings }, 0, 6, 6);
      expect((await mover.freeze(rings, "drained", soon())).queues[0]?.lastUsed).toBe(6);
    });
  }
});

describe("reset", () => {
  test("waits for a device that runs, not for one that is freezed", async () => {
    const fromRunning = await running(1);
    fromRunning.fn.faults.resetNeverEnds = true;
    expect(await rejection(fromRunning.mover.reset(soon(30)))).toMatchObject({ code: "resetTimedOut" });

    const { mover, rings, fn, vf } = await running(1);
    await mover.freeze(rings, "drained", soon());
    fn.faults.resetNeverEnds = true;
    await mover.reset(soon(30));
    expect(fn.statusWrites).toEqual([0]);
    expect(mover.snapshot()).toEqual({ kind: "reset" });
    // Only then the next start begins.
    const starting = mover.configure(wantedState(1), soon());
    await Bun.sleep(10);
    expect(vf.restored.length).toBe(1);
    fn.faults.resetNeverEnds = false;
    fn.status = 0;
    await starting;
    expect(vf.restored.length).toBe(2);
  });

  test("a device that was let go on by hand is waited for", async () => {
    const { mover, rings, fn } = await running(1);
    await mover.freeze(rings, "drained", soon());
    await mover.manual.change("running", soon());
    fn.faults.resetNeverEnds = true;
    expect(await rejection(mover.reset(soon(30)))).toMatchObject({ code: "resetTimedOut" });
  });

  test("what an earlier process left unfinished is finished first", async () => {
    const { host, managed, fn, vf } = await running(1);
    const revived = new VendorMover(host, managed, { kind: "reset" });
    await revived.configure(wantedState(1, 4), soon());
    expect(fn.statusWrites).toEqual([0]);
    expect(vf.restored.at(-1)?.indices[0]?.lastAvail).toBe(4);
  });
});

describe("once the admin queue is dead", () => {
  test("a running VF is moved by its registers", async () => {
    const { mover, pf, fn, rings } = await running(1);
    pf.complete(0xffff);
    await soon().poll(() => mover.capabilities.resumeAnywhere === false || undefined, 1);
    expect(await rejection(mover.manual.status(soon()))).toMatchObject({ code: "adminQueue" });
    const seen = pf.seen.length;
    rings.set(0, { available: 4, used: 4 });
    const state = await mover.freeze(rings, "drained", soon());
    expect(fn.rung).toEqual([0]);
    await mover.configure(state, soon());
    expect(mover.snapshot().kind).toBe("running");
    await mover.reset(soon());
    expect(fn.status).toBe(0);
    await mover.configure(wantedState(1), soon());
    expect(fn.status).toBe(0x0f);
    expect(names(pf.seen.slice(seen))).toEqual([]);
    expect(mover.kind).toBe("vendor");
  });

  test("a freezed VF keeps its state, and must begin at 0", async () => {
    const { mover, pf, fn, rings } = await running(1, 6);
    const state = await mover.freeze(rings, "drained", soon());
    pf.complete(0xffff);
    await soon().poll(() => mover.capabilities.resumeAnywhere === false || undefined, 1);
    expect(await mover.freeze(rings, "drained", soon())).toEqual(state);
    expect(await rejection(mover.configure(state, soon()))).toMatchObject({ code: "notSupported" });
    expect(fn.status).toBe(0);
    await mover.configure(wantedState(1), soon());
    expect(fn.status).toBe(0x0f);
  });

  test("one that dies half way ends the start with the reason and a reset device", async () => {
    const { mover, pf, fn } = await setUp(1);
    pf.answer = (asked) => {
      if (asked.name === "restore") pf.complete(0xffff);
      return pf.honest(asked);
    };
    expect(await rejection(mover.configure(wantedState(1), soon()))).toMatchObject({ code: "adminQueue" });
    expect(fn.status).toBe(0);
    await mover.configure(wantedState(1), soon());
    expect(fn.status).toBe(0x0f);
  });
});
