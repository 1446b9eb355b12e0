import { describe, expect, test } from "bun:test";
import { VendorMover } from "../../../src/virtio/movers/vendor.ts";
import type { FakeCommand } from "../../kit/fake-admin.ts";
import { rejection } from "../../kit/rejection.ts";
import { wantedState } from "./states.ts";
import { advance, cleanUpAfterEach, running, setUp, soon, with_ } from "./vendor-lab.ts";

cleanUpAfterEach();

const names = (commands: readonly FakeCommand[]) => commands.map(({ name }) => name);

async function prepared(queues = 2, base = 3) {
  const parts = await setUp(queues);
  await parts.mover.prepare(wantedState(queues, base), soon());
  parts.pf.seen.length = 0;
  return parts;
}

describe("prepare", () => {
  test("brings the whole state in and leaves the device standing", async () => {
    const { mover, vf, fn } = await prepared(2, 3);
    expect(vf.steps).toEqual(["quiesced", "freezed"]);
    expect(vf.status).toBe("freezed");
    expect(mover.snapshot()).toEqual({ kind: "reset" });
    expect(fn.rung).toEqual([]);
    await mover.configure(wantedState(2, 3), soon());
    expect(vf.restored.length).toBe(1);
    expect(vf.restored[0]).toMatchObject({ common: { status: 0x0f }, indices: [{ lastAvail: 3 }, { lastAvail: 3 }] });
  });

  test("a start with the same state lets it run, and no more", async () => {
    const { mover, pf, fn } = await prepared();
    await mover.configure(wantedState(2, 3), soon());
    expect(names(pf.seen)).toEqual(["modifyStatus", "modifyStatus"]);
    expect(fn.status).toBe(0x0f);
    expect(mover.snapshot().kind).toBe("running");
  });

  test("a start at other indices restores once, and asks for nothing", async () => {
    const { mover, pf, vf } = await prepared();
    await mover.configure(wantedState(2, 900), soon());
    expect(names(pf.seen)).toEqual(["restore", "modifyStatus", "modifyStatus"]);
    expect(vf.restored.at(-1)?.indices).toMatchObject([{ lastAvail: 900 }, { lastAvail: 900 }]);
  });

  test("a device that an operator has moved meanwhile is given all anew", async () => {
    for (const base of [3, 900]) {
      const { mover, vf } = await prepared();
      await mover.manual.change("quiesced", soon());
      await mover.configure(wantedState(2, base), soon());
      expect(vf.status).toBe("running");
      expect(vf.restored.at(-1)?.indices).toMatchObject([{ lastAvail: base }, { lastAvail: base }]);
      expect(vf.steps.slice(-4)).toEqual(["quiesced", "freezed", "quiesced", "running"]);
    }
  });

  test("also one that ran meanwhile, and stands again where it stood", async () => {
    const { mover, pf, vf, fn } = await prepared();
    await mover.manual.change("running", soon());
    with_(vf, { indices: vf.state!.indices.map((one) => ({ ...one, lastAvail: 77, lastUsed: 77 })) });
    await mover.manual.change("freezed", soon());
    pf.seen.length = 0;
    await mover.configure(wantedState(2, 3), soon());
    expect(names(pf.seen)).toEqual(["restore", "modifyStatus", "modifyStatus"]);
    expect(vf.state?.indices).toMatchObject([{ lastAvail: 3 }, { lastAvail: 3 }]);
    expect(fn.status).toBe(0x0f);
  });

  test("a device that somebody else has reset meanwhile is programmed anew, and runs", async () => {
    for (const base of [3, 900]) {
      const { mover, host, vf, fn } = await prepared();
      await host.device.reset(soon());
      await mover.configure(wantedState(2, base), soon());
      expect(vf.status).toBe("running");
      expect(fn.status).toBe(0x0f);
      expect(vf.restored.map(({ indices }) => indices[1])).toEqual([{ index: 1, lastAvail: base, lastUsed: base }]);
      expect(mover.snapshot().kind).toBe("running");
    }
  });

  test("one that does not run with what it was given anew either is reset, and the start fails", async () => {
    const { mover, host, pf, fn } = await prepared();
    await host.device.reset(soon());
    pf.answer = (asked) => {
      const answer = pf.honest(asked);
      fn.status = 0;
      return answer;
    };
    fn.statusWrites.length = 0;
    const failed = await rejection(mover.configure(wantedState(2, 3), soon()));
    expect(failed.message).toMatch(/does not run with what was restored/);
    expect(fn.statusWrites).toEqual([0]);
    expect(mover.snapshot()).toEqual({ kind: "reset" });
    expect(pf.commands("restore").length).toBe(2);
  });

  test("may be done again, and a reset forgets it", async () => {
    const { mover, pf, vf, fn } = await prepared();
    await mover.prepare(wantedState(2, 5), soon());
    expect(names(pf.seen)).toEqual(["restore"]);
    await mover.reset(soon());
    expect(fn.statusWrites.at(-1)).toBe(0);
    pf.seen.length = 0;
    await mover.configure(wantedState(2, 5), soon());
    expect(names(pf.seen)[0]).toBe("modifyStatus");
    expect(vf.restored.at(-1)?.indices).toMatchObject([{ lastAvail: 5 }, { lastAvail: 5 }]);
    expect(names(pf.seen)).toContain("restore");
  });

  test("leaves a reset device where it is refused", async () => {
    const { mover, pf, fn } = await setUp();
    pf.answer = (asked) => (asked.name === "restore" ? { status: 0x84 } : pf.honest(asked));
    expect((await rejection(mover.prepare(wantedState(2), soon()))).message).toMatch(/restore/);
    expect(fn.statusWrites.at(-1)).toBe(0);
    pf.answer = (asked) => pf.honest(asked);
    await mover.configure(wantedState(2), soon());
    expect(fn.status).toBe(0x0f);
  });

  test("of a device that runs is refused, and it runs on", async () => {
    const { mover, vf } = await running(2);
    expect(await rejection(mover.prepare(wantedState(2), soon()))).toMatchObject({ code: "invalid" });
    expect(vf.status).toBe("running");
  });

  test("of one that was stopped: it goes on from the new state", async () => {
    const { mover, vf, rings } = await running(1, 4);
    await mover.freeze(rings, "drained", soon());
    await mover.prepare(wantedState(1, 40), soon());
    await mover.configure(wantedState(1, 41), soon());
    expect(vf.restored.at(-1)?.indices[0]).toMatchObject({ lastAvail: 41 });
  });

  test("the next process knows nothing of it and resets the device", async () => {
    const { mover, host, managed, fn, vf } = await prepared();
    fn.status = 0x0f;
    const revived = new VendorMover(host, managed, mover.snapshot());
    await revived.configure(wantedState(2, 6), soon());
    expect(fn.statusWrites).toEqual([0]);
    expect(vf.restored.at(-1)?.indices[0]).toMatchObject({ lastAvail: 6 });
  });

  test("does nothing where the VF is moved by its registers", async () => {
    const { mover, pf, fn } = await setUp();
    pf.complete(0xffff);
    await soon().poll(() => mover.capabilities.resumeAnywhere === false || undefined, 1);
    await mover.prepare(wantedState(2), soon());
    expect(fn.status).toBe(0);
    await mover.configure(wantedState(2), soon());
    expect(fn.status).toBe(0x0f);
  });

  test("a prepared device whose admin queue dies is reset and begins by its registers", async () => {
    const { mover, pf, fn } = await prepared(2, 0);
    pf.complete(0xffff);
    await soon().poll(() => mover.capabilities.resumeAnywhere === false || undefined, 1);
    await mover.configure(wantedState(2), soon());
    expect(fn.statusWrites[0]).toBe(0);
    expect(fn.status).toBe(0x0f);
  });
});

test("a stop asks the device for nothing twice", async () => {
  const parts = await running(1);
  parts.pf.seen.length = 0;
  advance(parts, 0, 9, 9);
  await parts.mover.freeze(parts.rings, "drained", soon());
  expect(names(parts.pf.seen)).toEqual(["modifyStatus", "modifyStatus", "pendingBytes", "save"]);
});

test("a stop asks where the device is when it does not take the first step", async () => {
  const { mover, pf, rings } = await running(1);
  await mover.manual.change("quiesced", soon());
  pf.seen.length = 0;
  await mover.freeze(rings, "drained", soon());
  expect(names(pf.seen)).toEqual(["modifyStatus", "getStatus", "modifyStatus", "pendingBytes", "save"]);
});
