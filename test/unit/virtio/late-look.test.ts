import { describe, expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { AdminStatus } from "../../../src/virtio/admin/vendor.ts";
import type { FakeCommand } from "../../kit/fake-admin.ts";
import { rejection } from "../../kit/rejection.ts";
import { KillLab } from "./kill-lab.ts";
import { cleanUpAfterEach } from "./vendor-lab.ts";

/** A VF that an earlier process left standing still, with a PF that did not say so in time. */

cleanUpAfterEach();

const soon = () => Deadline.after(8000, "the test");
const until = (condition: () => boolean) => soon().poll(() => condition() || undefined, 1);

/** It stands still, and was taken up by a process that its PF has not answered. */
async function left(to: "quiesced" | "freezed", held = false) {
  const lab = await KillLab.vendor();
  const pf = lab.pf!;
  const vf = pf.vfs[0]!;
  await lab.path.start(lab.wanted(), lab.eventfds, soon(), lab.checkpoint);
  lab.work();
  await lab.checkpoint();
  await lab.path.manual!.change(to, soon());
  lab.fn.routes.clear();
  pf.answer = () => "silence";
  expect(await lab.succeed(held, 200)).toBe("asRecorded");
  expect(lab.path.running).toBe(true);
  expect(vf.status).toBe(to);
  lab.fn.rung.length = 0;
  const asked = () => pf.commands("getStatus").length;
  /** From now on it answers, but for the first commands that are this. */
  const answerFrom = (count: number, isSilent: (command: FakeCommand) => boolean = () => true) => {
    let silent = 0;
    pf.answer = (command) => (isSilent(command) && silent++ < count ? "silence" : pf.honest(command));
  };
  return { lab, pf, vf, asked, answerFrom };
}

describe("a VF that was left standing still by a PF that is silent", () => {
  for (const to of ["quiesced", "freezed"] as const) {
    test(`${to}: goes on as soon as the PF answers, and both are said once`, async () => {
      const { lab, vf, answerFrom } = await left(to);
      // Eventfds are borrowed for the take-up only.
      expect([...lab.fn.routes.keys()].sort()).toEqual([0, 1, 2]);
      answerFrom(1);
      await until(() => vf.status === "running" && lab.notices.length > 1);
      expect(lab.notices).toEqual([
        expect.stringMatching(/asked until it does/),
        expect.stringMatching(/standing still: it goes on/),
      ]);
      expect(lab.fn.rung).toEqual([0, 1]);
      expect(lab.failures).toEqual([]);
      lab.work();
      await lab.path.stop(lab.rings, "drained", soon());
      expect(lab.indices).toEqual(lab.done);
    });
  }

  test("is not asked any more when it was stopped", async () => {
    const { lab, pf, vf, answerFrom, asked } = await left("quiesced");
    answerFrom(0);
    await lab.path.stop(lab.rings, "drained", soon());
    expect(vf.status).toBe("freezed");
    const { length } = pf.seen;
    const before = asked();
    await Bun.sleep(600);
    expect(asked()).toBe(before);
    expect(pf.seen.length).toBe(length);
    expect(vf.status).toBe("freezed");
  });

  test("is not asked any more when it was reset, or its process let go of it", async () => {
    for (const end of [
      (lab: KillLab) => lab.path.reset(soon()),
      async (lab: KillLab) => lab.path.abandon(),
      (lab: KillLab) => lab.path.manual!.change("quiesced", soon()),
    ]) {
      const { lab, vf, answerFrom, asked } = await left("quiesced");
      answerFrom(0);
      await end(lab);
      const { status } = vf;
      const before = asked();
      await Bun.sleep(600);
      expect(asked()).toBe(before);
      expect(vf.status).toBe(status);
    }
  });

  test("goes on with what is enabled next, and is not asked then", async () => {
    const { lab, vf, answerFrom, asked } = await left("freezed");
    answerFrom(0);
    await lab.path.enable(new Set([0]), lab.eventfds, lab.rings, soon());
    expect(vf.status).toBe("running");
    const before = asked();
    await Bun.sleep(600);
    expect(asked()).toBe(before);
  });

  test("is left alone where an operator holds it", async () => {
    const { lab, vf, answerFrom, asked } = await left("quiesced", true);
    answerFrom(0);
    const before = asked();
    await Bun.sleep(600);
    expect(asked()).toBe(before);
    expect(vf.status).toBe("quiesced");
    expect(lab.notices).toEqual([]);
  });

  test("that changes its status while it is asked is not changed from here", async () => {
    const { lab, pf, vf } = await left("quiesced");
    const answering = Promise.withResolvers<void>();
    let asked = 0;
    pf.answer = async (command) => {
      // What was true when it was asked.
      const answer = pf.honest(command);
      if (command.name === "getStatus" && asked++ === 0) await answering.promise;
      return answer;
    };
    await until(() => asked === 1);
    const stopping = lab.path.stop(lab.rings, "drained", soon());
    answering.resolve();
    await stopping;
    expect(vf.status).toBe("freezed");
    await Bun.sleep(20);
    expect(vf.status).toBe("freezed");
  });

  test("is stopped only when it has gone on", async () => {
    const { lab, pf, vf } = await left("quiesced");
    const going = Promise.withResolvers<void>();
    const steps: string[] = [];
    pf.answer = async (command) => {
      steps.push(command.name!);
      if (command.name === "save" && !steps.includes("restore")) await going.promise;
      return pf.honest(command);
    };
    await until(() => steps.includes("save"));
    const stopping = lab.path.stop(lab.rings, "drained", soon());
    const { length } = steps;
    await Bun.sleep(20);
    expect(steps.length).toBe(length);
    going.resolve();
    await stopping;
    expect(vf.status).toBe("freezed");
    expect(lab.notices.length).toBe(2);
  });

  test("is asked again where a change is not answered, and moved by its registers until that is", async () => {
    const { lab, pf, vf } = await left("quiesced");
    let held: FakeCommand | undefined;
    pf.answer = (command) => {
      if (command.name !== "modifyStatus" || held !== undefined) return pf.honest(command);
      held = command;
      return "silence";
    };
    await until(() => !lab.path.capabilities.resumeAnywhere);
    expect(vf.status).toBe("quiesced");
    pf.complete(held!.head);
    await until(() => vf.status === "running");
    expect(lab.failures).toEqual([]);
  }, 20_000);

  test("is reset without waiting for what its PF does not answer", async () => {
    const { lab, pf, vf } = await left("quiesced");
    let silent = false;
    pf.answer = (command) => {
      if (command.name !== "modifyStatus") return pf.honest(command);
      silent = true;
      return "silence";
    };
    await until(() => silent);
    await lab.path.reset(Deadline.after(2000, "the reset"));
    expect(lab.fn.status).toBe(0);
    expect(vf.status).toBe("init");
    expect(lab.failures).toEqual([]);
  });

  test("and does not go on from there is one that asks for a reset", async () => {
    const { lab, vf, answerFrom, asked } = await left("freezed");
    vf.state = { ...vf.state!, common: { ...vf.state!.common, driverFeatures: 1n } };
    answerFrom(0);
    await until(() => lab.failures.length === 1);
    expect(lab.failures[0]).toMatchObject({ gone: false, error: { message: expect.stringMatching(/does not go on/) } });
    const before = asked();
    await Bun.sleep(600);
    expect(asked()).toBe(before);
  });

  test("is not asked any more when its PF is dead", async () => {
    const { lab, pf, answerFrom } = await left("quiesced");
    answerFrom(0);
    pf.complete(0xffff);
    await until(() => !lab.path.capabilities.resumeAnywhere);
    const { length } = pf.seen;
    await Bun.sleep(600);
    expect(pf.seen.length).toBe(length);
  });

  test("is asked again after a change by hand that was refused", async () => {
    const { lab, pf, vf } = await left("freezed");
    pf.answer = (command) =>
      command.name === "modifyStatus" ? { status: 0x80 | AdminStatus.error } : pf.honest(command);
    await rejection(lab.path.manual!.change("quiesced", soon()));
    pf.answer = (command) => pf.honest(command);
    await until(() => vf.status === "running");
  });
});
