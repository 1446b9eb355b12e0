import { describe, expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { drainEventfd } from "../../../src/native/sys.ts";
import type { DeviceClass } from "../../../src/plugin.ts";
import { withEnabled } from "../../../src/virtio/device-state.ts";
import { Status } from "../../../src/virtio/features.ts";
import { PciCommand, PciConfig } from "../../../src/virtio/registers.ts";
import type { FakeCommand } from "../../kit/fake-admin.ts";
import { rejection } from "../../kit/rejection.ts";
import { KillLab } from "./kill-lab.ts";
import { cleanUpAfterEach } from "./vendor-lab.ts";

cleanUpAfterEach();

const soon = (ms = 3000) => Deadline.after(ms, "the test");
const names = (commands: readonly FakeCommand[]) => commands.map(({ name }) => name);

/** Running, and recorded so. */
async function running(make: () => Promise<KillLab> = KillLab.vendor): Promise<KillLab> {
  const lab = await make();
  await lab.path.start(lab.wanted(), lab.eventfds, soon(), lab.checkpoint);
  lab.work();
  await lab.checkpoint();
  return lab;
}

describe("a VF that runs", () => {
  test("costs one command and one register, and both sides look once", async () => {
    const lab = await running();
    for (const { call } of lab.eventfds.values()) drainEventfd(call);
    lab.pf!.seen.length = 0;
    lab.fn.rung.length = 0;
    expect(await lab.succeed()).toBe("asRecorded");
    expect(names(lab.pf!.seen)).toEqual(["getStatus"]);
    // With the doorbells.
    expect(lab.life.accesses).toBe(2 + 2);
    expect(lab.fn.rung).toEqual([0, 1]);
    expect([...lab.eventfds.values()].map(({ call }) => drainEventfd(call))).toEqual([1, 1]);
    expect(lab.path.running).toBe(true);
  });

  test("is connected where the record does not say that it was", async () => {
    const lab = await KillLab.registers();
    // The record is written before the kicks are connected.
    await lab.path.start(lab.wanted(), lab.eventfds, soon(), lab.checkpoint);
    const { resets } = lab;
    await lab.succeed();
    expect([...lab.fn.connected].sort()).toEqual([0, 1]);
    expect(lab.path.running).toBe(true);
    expect(lab.resets).toBe(resets);
  });

  test("and waits on kicks itself is told of them once more, whatever the record says", async () => {
    const lab = await running(KillLab.direct);
    // The process before was about to have them all connected anew.
    lab.fn.connected.clear();
    expect(await lab.succeed()).toBe("asRecorded");
    expect([...lab.fn.connected].sort()).toEqual([0, 1]);
    await lab.path.enable(new Set([0]), lab.eventfds, lab.rings, soon());
    await lab.checkpoint();
    // It was noted that this one is not used, and the function did not hear of it.
    lab.fn.connected.add(1);
    expect(await lab.succeed()).toBe("asRecorded");
    expect([...lab.fn.connected]).toEqual([0]);
  });

  test("and was reset meanwhile is said to be so, with nothing connected", async () => {
    for (const make of [KillLab.vendor, KillLab.registers]) {
      const lab = await running(make);
      await lab.fn.region(4).write(20, 1, 0);
      expect(await lab.succeed()).toBe("reset");
      expect(lab.path.running).toBe(false);
      expect(lab.outcome).toMatchObject({ kind: "reset", connected: [], queues: [] });
    }
  });

  test("is left where an operator holds it, and goes on where nobody does", async () => {
    for (const held of [true, false]) {
      for (const to of ["quiesced", "freezed"] as const) {
        const lab = await running();
        await lab.path.manual!.change(to, soon());
        expect(await lab.succeed(held)).toBe("asRecorded");
        expect(lab.pf!.vfs[0]!.status).toBe(held ? to : "running");
        expect(lab.indices).toEqual(lab.done);
      }
    }
  });

  test("does not go on with a state that makes no sense: it is reset", async () => {
    const lab = await running();
    const vf = lab.pf!.vfs[0]!;
    await lab.path.manual!.change("freezed", soon());
    vf.state = { ...vf.state!, common: { ...vf.state!.common, driverFeatures: 1n } };
    expect(await lab.succeed()).toBe("reset");
    expect(lab.fn.status).toBe(0);
    expect(lab.path.running).toBe(false);
  });

  test("keeps what it has in flight and cannot list", async () => {
    const lab = await running();
    const vf = lab.pf!.vfs[0]!;
    lab.keep(0, [3]);
    for (const change of [{ inFlight: [] }, { completed: [{ queue: 0, heads: [3] }] }]) {
      vf.state = { ...vf.state!, ...change };
      await lab.path.manual!.change("freezed", soon());
      const { length } = vf.restored;
      expect(await lab.succeed()).toBe("asRecorded");
      expect(vf.status).toBe("running");
      expect(vf.restored.length).toBe(length);
    }
  });

  test("and took DRIVER_OK back when a stop kept it from memory goes on, connected", async () => {
    const lab = await running(() => KillLab.registers({ receives: (queue) => queue === 0 }));
    const { resets } = lab;
    lab.fn.configBytes[PciConfig.command]! &= ~PciCommand.busMaster;
    // As QEMU's devices do.
    lab.fn.status &= ~Status.driverOk;
    lab.fn.routes.clear();
    expect(await lab.succeed()).toBe("asRecorded");
    expect(lab.mayRun).toBe(true);
    expect([...lab.fn.routes.keys()].sort()).toEqual([0, 1, 2]);
    expect(lab.resets).toBe(resets);
  });

  test("is taken as it was recorded where nobody can be asked, and changed when somebody can", async () => {
    const lab = await running();
    const pf = lab.pf!;
    await lab.path.manual!.change("quiesced", soon());
    pf.answer = () => "silence";
    expect(await lab.succeed()).toBe("asRecorded");
    expect(lab.path.running).toBe(true);
    pf.answer = (asked) => pf.honest(asked);
    await lab.path.enable(new Set([0]), lab.eventfds, lab.rings, soon());
    expect(pf.vfs[0]!.status).toBe("running");
    expect(lab.indices).toEqual(lab.done);
  });

  test("of a PF that is dead is looked at by its registers", async () => {
    for (const isReset of [false, true]) {
      const lab = await running();
      lab.pf!.complete(0xffff);
      await soon().poll(() => lab.path.capabilities.resumeAnywhere === false || undefined, 1);
      if (isReset) await lab.fn.region(4).write(20, 1, 0);
      lab.pf!.seen.length = 0;
      expect(await lab.succeed()).toBe(isReset ? "reset" : "asRecorded");
      expect(lab.path.running).toBe(!isReset);
      expect(lab.pf!.seen).toEqual([]);
    }
  });

  test("is recorded so also while its queues are being changed", async () => {
    const lab = await running();
    const pf = lab.pf!;
    const kinds = new Set<string>();
    pf.answer = (asked) => {
      kinds.add((lab.path.snapshot().data as { mover: { kind: string } } & object).mover.kind);
      return pf.honest(asked);
    };
    await lab.path.enable(new Set([0]), lab.eventfds, lab.rings, soon());
    expect([...kinds]).toEqual(["running"]);
  });
});

test("an idle VF costs nothing", async () => {
  const lab = await KillLab.vendor();
  lab.pf!.seen.length = 0;
  expect(await lab.succeed()).toBe("asRecorded");
  expect(lab.life.accesses).toBe(0);
  expect(lab.pf!.seen).toEqual([]);
});

test("a start that does not come to an end is undone, and the record says when", async () => {
  const lab = await KillLab.vendor();
  const pf = lab.pf!;
  const kinds: string[] = [];
  lab.fn.onReset = () => kinds.push((lab.path.snapshot().data as { mover: { kind: string } } & object).mover.kind);
  pf.answer = (asked) => {
    const isLast = asked.name === "modifyStatus" && asked.data[2] === 1;
    return isLast ? { status: 0x85 } : pf.honest(asked);
  };
  await rejection(lab.path.start(lab.wanted(), lab.eventfds, soon(), lab.checkpoint));
  // Until it is at rest it may be running.
  expect(kinds[0]).toBe("starting");
  await lab.checkpoint();
  await lab.succeed();
  expect(lab.path.running).toBe(false);
});

describe("a device that was taken up running", () => {
  test("is started again with the same rings: it is left alone", async () => {
    const lab = await running();
    await lab.succeed();
    lab.pf!.seen.length = 0;
    lab.fn.rung.length = 0;
    await lab.path.start(lab.wanted(), lab.eventfds, soon());
    expect(lab.pf!.seen).toEqual([]);
    expect(lab.fn.rung).toEqual([0, 1]);
    // Once only.
    const again = lab.path.start(lab.wanted(), lab.eventfds, soon());
    expect((await rejection(again)).message).toMatch(/running already/);
  });

  test("with others: it is reset first", async () => {
    const lab = await running();
    await lab.succeed();
    await lab.path.start(withEnabled(lab.wanted(), new Set([1])), lab.eventfds, soon());
    expect(lab.resets).toBe(1);
    expect(lab.outcome).toMatchObject({ kind: "running", internal: "running", used: [false, true], connected: [1] });
    expect(lab.indices).toEqual(lab.done);
  });

  test("and was stopped since is started as any other", async () => {
    const lab = await running();
    await lab.succeed();
    await lab.path.enable(new Set([0, 1]), lab.eventfds, lab.rings, soon());
    const again = lab.path.start(lab.wanted(), lab.eventfds, soon());
    expect((await rejection(again)).message).toMatch(/running already/);
  });
});

describe("the function's own control queue", () => {
  const members: Pick<DeviceClass, "control"> = {
    control: {
      queue: () => 2,
      features: [],
      commands: ({ queues }) => [
        { name: "USE", request: Uint8Array.from(queues), answerSize: 1, accepted: () => true },
      ],
    },
  };

  test("is told once more what was in use before that is changed", async () => {
    const lab = await running(() => KillLab.registers(members));
    // The earlier process had got so far as to tell it, and the guest went on.
    const told = lab.path.enable(new Set([0]), lab.eventfds, lab.rings, soon());
    await told;
    lab.rings.set(1, { available: lab.done[1]! + 2, used: lab.done[1]! });
    await lab.succeed();
    lab.control!.answer = (request, honest) => {
      if (request.includes(1)) lab.rings.set(1, { available: lab.done[1]! + 2, used: lab.done[1]! + 2 });
      return honest;
    };
    await lab.path.enable(new Set([0]), lab.eventfds, lab.rings, soon());
    expect(lab.control!.seen.map((request) => [...request])).toEqual([[0, 1], [0], [0, 1], [0]]);
  });

  test("is looked at also where its process died before it had rung", async () => {
    const lab = await running(() => KillLab.registers(members));
    const { rung } = lab.fn;
    const ring = lab.fn.onRing;
    // The last thing that it does is not carried out.
    lab.fn.onRing = (queue) => {
      if (queue === 2) lab.life.endsAfter(0);
    };
    const enabling = lab.path.enable(new Set([0]), lab.eventfds, lab.rings, soon());
    enabling.catch(() => {});
    await soon().poll(() => (rung.includes(2) && lab.life.hasDied ? true : undefined), 1);
    lab.fn.onRing = ring;
    await lab.succeed();
    await lab.path.enable(new Set([0]), lab.eventfds, lab.rings, soon());
    expect([...lab.control!.seen.at(-1)!]).toEqual([0]);
  });
});
