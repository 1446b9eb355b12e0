import { describe, expect, test } from "bun:test";
import { VhostdError } from "../../../src/base/errors.ts";
import { InternalStatus, MODIFY_STATUS_DATA } from "../../../src/virtio/admin/vendor.ts";
import { RegistersMover } from "../../../src/virtio/movers/registers.ts";
import { VendorMover } from "../../../src/virtio/movers/vendor.ts";
import type { FakeCommand } from "../../kit/fake-admin.ts";
import { FakeFunction } from "../../kit/fake-function.ts";
import { rejection } from "../../kit/rejection.ts";
import { moverHost } from "./mover-host.ts";
import { wantedState } from "./states.ts";
import { cleanUpAfterEach, type Parts, running, setUp, soon } from "./vendor-lab.ts";

cleanUpAfterEach();

const names = (commands: readonly FakeCommand[]) => commands.map(({ name }) => name);
/** What it would be told to become. */
const target = ({ name, data }: FakeCommand) => (name === "modifyStatus" ? MODIFY_STATUS_DATA.read(data).status : -1);

async function standingBy(queues = 2) {
  const parts = await setUp(queues);
  await parts.mover.standBy(soon());
  parts.pf.seen.length = 0;
  return parts;
}

/** The queue of its PF is dead. */
async function unmanaged({ mover, pf }: Pick<Parts, "mover" | "pf">) {
  pf.complete(0xffff);
  await soon().poll(() => mover.capabilities.resumeAnywhere === false || undefined, 1);
  pf.seen.length = 0;
}

describe("standing by", () => {
  test("a device that was reset is freezed, and nothing else happens to it", async () => {
    const { mover, pf, vf, fn } = await setUp();
    pf.seen.length = 0;
    await mover.standBy(soon());
    expect(names(pf.seen)).toEqual(["modifyStatus", "modifyStatus"]);
    expect(vf.steps).toEqual(["quiesced", "freezed"]);
    expect(fn.statusWrites).toEqual([]);
    await mover.standBy(soon());
    expect(pf.seen.length).toBe(2);
  });

  test("the start after it is told three things", async () => {
    const { mover, pf, vf, fn } = await standingBy();
    await mover.configure(wantedState(2, 9), soon());
    expect(names(pf.seen)).toEqual(["restore", "modifyStatus", "modifyStatus"]);
    expect(vf.restored).toMatchObject([{ common: { status: 0x0f }, indices: [{ lastAvail: 9 }, { lastAvail: 9 }] }]);
    expect(fn.status).toBe(0x0f);
    expect(mover.snapshot().kind).toBe("running");
  });

  test("so does an early set-up after it, and the start behind that", async () => {
    const { mover, pf } = await standingBy();
    await mover.prepare(wantedState(2, 9), soon());
    expect(names(pf.seen)).toEqual(["restore"]);
    await mover.configure(wantedState(2, 9), soon());
    expect(names(pf.seen)).toEqual(["restore", "modifyStatus", "modifyStatus"]);
  });

  for (const to of ["quiesced", "running"] as const) {
    test(`a start where an operator has moved it to ${to} meanwhile: restore is refused once, and it runs`, async () => {
      const { mover, pf, vf, fn } = await standingBy();
      await mover.manual.change(to, soon());
      const moved = vf.steps.length;
      pf.seen.length = 0;
      await mover.configure(wantedState(2, 9), soon());
      expect(names(pf.seen).slice(0, 2)).toEqual(["restore", "getStatus"]);
      expect(pf.commands("restore").length).toBe(2);
      const way = to === "quiesced" ? [] : ["quiesced"];
      expect(vf.steps.slice(moved)).toEqual([...way, "freezed", "quiesced", "running"] as typeof vf.steps);
      expect(vf.restored).toMatchObject([{ indices: [{ lastAvail: 9 }, { lastAvail: 9 }] }]);
      expect(fn.status).toBe(0x0f);
    });
  }

  test("so does one where somebody else has reset it", async () => {
    const { mover, host, vf, fn } = await standingBy();
    await host.device.reset(soon());
    await mover.configure(wantedState(2, 9), soon());
    expect(vf.restored.length).toBe(1);
    expect(vf.status).toBe("running");
    expect(fn.status).toBe(0x0f);
  });

  test("a reset after it ends at status 0, and it may stand by again", async () => {
    const { mover, vf, fn } = await standingBy();
    await mover.reset(soon());
    expect(fn.statusWrites).toEqual([0]);
    expect(vf.status).toBe("init");
    await mover.standBy(soon());
    expect(vf.status).toBe("freezed");
    await mover.configure(wantedState(2, 9), soon());
    expect(fn.statusWrites).toEqual([0]);
    expect(fn.status).toBe(0x0f);
  });

  test("what an earlier reset left behind is done first", async () => {
    const { mover, fn, vf, host, managed } = await setUp();
    fn.status = 0x0f;
    await mover.standBy(soon());
    expect(fn.statusWrites).toEqual([0]);
    expect(vf.status).toBe("freezed");
    fn.status = 0x0f;
    fn.faults.resetNeverEnds = true;
    const other = new VendorMover(host, managed);
    expect(await rejection(other.standBy(soon(50)))).toMatchObject({ code: "resetTimedOut" });
  });

  test("is no state that is kept: the next process starts it all the same", async () => {
    const { mover, host, managed, vf, fn } = await standingBy();
    expect(mover.snapshot()).toEqual({ kind: "reset" });
    for (const again of [false, true]) {
      const revived = new VendorMover(host, managed, mover.snapshot());
      if (again) await revived.standBy(soon());
      await revived.configure(wantedState(2, 6), soon());
      expect(vf.restored.at(-1)?.indices[0]).toMatchObject({ lastAvail: 6 });
      expect(vf.status).toBe("running");
      expect(fn.status).toBe(0x0f);
      await revived.reset(soon());
    }
  });

  test("one that is asked to freeze is not running", async () => {
    const { mover, rings } = await standingBy();
    expect(await rejection(mover.freeze(rings, "drained", soon()))).toMatchObject({ code: "invalid" });
  });
});

describe("does nothing", () => {
  test("to a device that runs", async () => {
    const { mover, pf, vf } = await running(2);
    pf.seen.length = 0;
    await mover.standBy(soon());
    expect(pf.seen).toEqual([]);
    expect(vf.status).toBe("running");
    expect(mover.snapshot().kind).toBe("running");
  });

  test("to one that stands with its state", async () => {
    const { mover, pf, rings, vf } = await running(2, 4);
    const state = await mover.freeze(rings, "drained", soon());
    pf.seen.length = 0;
    await mover.standBy(soon());
    expect(pf.seen).toEqual([]);
    expect(mover.snapshot().kind).toBe("frozen");
    await mover.configure(state, soon());
    expect(vf.restored.length).toBe(1);
  });

  test("to one that was prepared", async () => {
    const { mover, pf } = await setUp();
    await mover.prepare(wantedState(2, 3), soon());
    pf.seen.length = 0;
    await mover.standBy(soon());
    await mover.configure(wantedState(2, 3), soon());
    expect(names(pf.seen)).toEqual(["modifyStatus", "modifyStatus"]);
  });

  test("to one that is moved by its registers", async () => {
    const parts = await setUp();
    await unmanaged(parts);
    await parts.mover.standBy(soon());
    expect(parts.pf.seen).toEqual([]);
    expect(parts.fn.statusWrites).toEqual([]);
    await parts.mover.configure(wantedState(2), soon());
    expect(parts.fn.status).toBe(0x0f);
  });
});

test("a device that stands by when its PF's queue dies is reset and begins by its registers", async () => {
  const parts = await standingBy();
  await unmanaged(parts);
  await parts.mover.configure(wantedState(2), soon());
  expect(parts.fn.statusWrites[0]).toBe(0);
  expect(parts.fn.status).toBe(0x0f);
});

describe("a device that does not stand by", () => {
  for (const step of ["quiesced", "freezed"] as const) {
    test(`because it refuses to be ${step} starts all the same`, async () => {
      const { mover, pf, vf, fn } = await setUp();
      pf.answer = (asked) => (target(asked) === InternalStatus[step] ? { status: 0x85 } : pf.honest(asked));
      const code = step === "quiesced" ? "quiesceFailed" : "freezeFailed";
      expect(await rejection(mover.standBy(soon()))).toMatchObject({ code });
      expect(mover.snapshot()).toEqual({ kind: "reset" });
      expect(fn.statusWrites).toEqual([]);
      pf.answer = (asked) => pf.honest(asked);
      await mover.configure(wantedState(2, 9), soon());
      expect(vf.restored).toMatchObject([{ indices: [{ lastAvail: 9 }, { lastAvail: 9 }] }]);
      expect(vf.status).toBe("running");
      expect(fn.status).toBe(0x0f);
    });
  }

  test("can be reset, where it took the first step only", async () => {
    const { mover, pf, fn, vf } = await setUp();
    pf.answer = (asked) => (target(asked) === InternalStatus.freezed ? { status: 0x85 } : pf.honest(asked));
    await rejection(mover.standBy(soon()));
    await mover.reset(soon());
    expect(fn.statusWrites).toEqual([0]);
    expect(vf.status).toBe("init");
  });
});

describe("what is to be connected when the device runs", () => {
  /** Notes what happens, in order; connects late. */
  function orderOf({ pf }: Pick<Parts, "pf">) {
    const order: string[] = [];
    const connect = async () => {
      order.push("begun");
      await Bun.sleep(10);
      order.push("connected");
    };
    pf.answer = (asked) => {
      if (target(asked) === InternalStatus.running) order.push("running");
      return pf.honest(asked);
    };
    return { order, connect };
  }

  test("is connected before, however the device came to stand", async () => {
    const ways: ((parts: Parts) => Promise<unknown>)[] = [
      async () => {},
      ({ mover }) => mover.standBy(soon()),
      ({ mover }) => mover.prepare(wantedState(2), soon()),
      async ({ mover, rings }) => {
        await mover.configure(wantedState(2), soon());
        await mover.freeze(rings, "drained", soon());
      },
    ];
    for (const way of ways) {
      const parts = await setUp();
      await way(parts);
      const { order, connect } = orderOf(parts);
      await parts.mover.configure(wantedState(2), soon(), { connect });
      expect(order).toEqual(["begun", "connected", "running"]);
    }
  });

  test("is connected once more where the device has to be programmed once more", async () => {
    const parts = await setUp();
    await parts.mover.prepare(wantedState(2), soon());
    await parts.host.device.reset(soon());
    const { order, connect } = orderOf(parts);
    await parts.mover.configure(wantedState(2), soon(), { connect });
    expect(order.slice(-3)).toEqual(["begun", "connected", "running"]);
  });

  test("and is not, is a failure that resets the device", async () => {
    for (const standsBy of [false, true]) {
      const { mover, vf, fn } = await setUp();
      if (standsBy) await mover.standBy(soon());
      const refused = mover.configure(wantedState(2), soon(), {
        connect: async () => {
          throw new VhostdError("io", "no such vector");
        },
      });
      expect((await rejection(refused)).message).toBe("no such vector");
      expect(fn.statusWrites).toEqual([0]);
      expect(vf.status).toBe("init");
      expect(vf.steps).not.toContain("running");
      expect(mover.snapshot()).toEqual({ kind: "reset" });
      await mover.configure(wantedState(2), soon());
      expect(fn.status).toBe(0x0f);
    }
  });

  const byRegisters = {
    "a device that is always moved by its registers": async () => {
      const fn = new FakeFunction({ queues: 2 });
      return { fn, mover: new RegistersMover(await moverHost(fn)) };
    },
    "one that is moved by its registers for now": async () => {
      const parts = await setUp();
      await unmanaged(parts);
      return parts;
    },
  };
  for (const [what, make] of Object.entries(byRegisters)) {
    test(`of ${what}: it is waited for, and its failure is the start's`, async () => {
      const { mover, fn } = await make();
      let connected = 0;
      const connect = async () => {
        await Bun.sleep(5);
        connected++;
      };
      await mover.configure(wantedState(2), soon(), { connect });
      expect(connected).toBe(1);
      expect(fn.status).toBe(0x0f);
      await mover.reset(soon());
      const refused = mover.configure(wantedState(2), soon(), {
        connect: async () => {
          throw new VhostdError("io", "no such vector");
        },
      });
      expect((await rejection(refused)).message).toBe("no such vector");
      await mover.reset(soon());
      expect(fn.status).toBe(0);
    });
  }
});

test("a device that stood by is reset without its silent PF being taken for dead", async () => {
  const { mover, pf, fn, managed } = await setUp();
  await mover.standBy(soon());
  pf.answer = () => "silence";
  pf.seen.length = 0;
  await mover.reset(soon(5000));
  expect(fn.statusWrites.at(-1)).toBe(0);
  expect(names(pf.seen)).toEqual(["getStatus"]);
  expect(managed.admin.queue.state).toEqual({ kind: "ready" });
});

test("a mover that takes the place of another waits for what that left with the PF", async () => {
  const { mover, pf, host, managed, vf, fn } = await setUp();
  const late: (() => void)[] = [];
  pf.answer = (command) => new Promise((resolve) => late.push(() => resolve(pf.honest(command))));
  expect(await rejection(mover.standBy(soon(20)))).toMatchObject({ code: "quiesceFailed" });
  const next = new VendorMover(host, managed);
  const started = next.configure(wantedState(2, 9), soon());
  await Bun.sleep(50);
  expect(fn.status).toBe(0);
  pf.answer = (command) => pf.honest(command);
  for (const answer of late) answer();
  await started;
  expect(vf.status).toBe("running");
  expect(vf.restored.at(-1)?.indices[0]).toMatchObject({ lastAvail: 9 });
});

test("a function moved by its registers that starts neither way fails once, and one that is not connected is reset", async () => {
  const fn = new FakeFunction({ queues: 1 });
  const mover = new RegistersMover(await moverHost(fn));
  const unhandled: unknown[] = [];
  const note = (error: unknown) => void unhandled.push(error);
  process.on("unhandledRejection", note);
  try {
    const connect = async () => {
      throw new VhostdError("io", "no such vector");
    };
    // It cannot begin there.
    await rejection(mover.configure(wantedState(1, 7), soon(), { connect }));
    await Bun.sleep(1);
    expect(unhandled).toEqual([]);
    await rejection(mover.configure(wantedState(1), soon(), { connect }));
    expect(mover.snapshot()).toEqual({ kind: "reset" });
    expect(fn.status).toBe(0);
  } finally {
    process.off("unhandledRejection", note);
  }
});
