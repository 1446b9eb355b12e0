import { expect, test } from "bun:test";
import { wantedState } from "../virtio/states.ts";
import { cleanUpAfterEach } from "../virtio/vendor-lab.ts";
import { makeTarget } from "./target-lab.ts";

cleanUpAfterEach();

/** The operations that were asked for so far have ended. */
const settled = ({ operations, standBys }: Pick<Awaited<ReturnType<typeof makeTarget>>, "operations" | "standBys">) =>
  standBys.run(() => operations.run(async () => {}));

test("a VF whose front-end has connected stands by, and is started by few commands", async () => {
  const parts = await makeTarget();
  const { target, pf, vf, fn } = parts;
  target.standBy();
  await settled(parts);
  expect(vf.status).toBe("freezed");
  pf.seen.length = 0;
  await target.start(wantedState(1), new Map());
  expect(pf.seen.map(({ name }) => name)).toEqual(["restore", "modifyStatus", "modifyStatus"]);
  expect(fn.status).toBe(0x0f);
});

test("one operation after the other: what was asked for before is waited for, and a start waits for it", async () => {
  const { target, pf, vf, operations } = await makeTarget();
  const gate = Promise.withResolvers<void>();
  const earlier = operations.run(() => gate.promise);
  pf.seen.length = 0;
  target.standBy();
  await Bun.sleep(0);
  const started = target.start(wantedState(1), new Map());
  await Bun.sleep(5);
  expect(pf.seen).toEqual([]);
  gate.resolve();
  await Promise.all([earlier, started]);
  expect(vf.steps).toEqual(["quiesced", "freezed", "quiesced", "running"]);
});

test("a VF that is not idle is left alone", async () => {
  for (const name of ["running", "configuring", "stopping", "failed"] as const) {
    const parts = await makeTarget();
    const { target, pf, become, lines } = parts;
    become(name === "failed" ? { name, reason: "it is gone" } : { name });
    pf.seen.length = 0;
    target.standBy();
    await settled(parts);
    expect(pf.seen).toEqual([]);
    expect(lines).toEqual([]);
  }
});

test("what it is when its turn comes counts, not what it was when it was asked", async () => {
  for (const [before, then, status] of [
    ["idle", "running", "init"],
    ["stopping", "idle", "freezed"],
  ] as const) {
    const parts = await makeTarget();
    const { target, vf, become, operations } = parts;
    become({ name: before });
    const earlier = operations.run(async () => become({ name: then }));
    target.standBy();
    await Promise.all([earlier, settled(parts)]);
    expect(vf.status).toBe(status);
  }
});

test("a failure is logged, no more, and the start that follows is a normal one", async () => {
  const parts = await makeTarget();
  const { target, pf, fn, vf, lines } = parts;
  pf.answer = ({ name }) => (name === "getStatus" || name === "modifyStatus" ? { status: 0x85 } : { status: 0 });
  target.standBy();
  await settled(parts);
  expect(lines).toEqual([expect.stringMatching(/^debug: its start is not made ready: .*refused modifyStatus/)]);
  pf.answer = (asked) => pf.honest(asked);
  await target.start(wantedState(1, 5), new Map());
  expect(fn.status).toBe(0x0f);
  expect(vf.restored.map(({ indices }) => indices[0]?.lastAvail)).toEqual([5]);
});

test("a front-end that goes away before it starts leaves a VF at rest", async () => {
  const parts = await makeTarget();
  const { target, vf, fn, rings } = parts;
  target.standBy();
  await target.release(rings);
  expect(vf.status).toBe("init");
  expect(fn.statusWrites.at(-1)).toBe(0);
  target.standBy();
  await target.start(wantedState(1), new Map());
  expect(fn.status).toBe(0x0f);
});

test("a VF that waits for its turn holds up nothing, and is not told when its front-end has gone meanwhile", async () => {
  const parts = await makeTarget();
  const { target, pf, rings, standBys } = parts;
  const gate = Promise.withResolvers<void>();
  const other = standBys.run(() => gate.promise);
  pf.seen.length = 0;
  target.standBy();
  await target.start(wantedState(1), new Map());
  expect(pf.seen.map(({ name }) => name)).toEqual([
    "modifyStatus",
    "modifyStatus",
    "restore",
    "modifyStatus",
    "modifyStatus",
  ]);
  await target.release(rings);
  pf.seen.length = 0;
  gate.resolve();
  await Promise.all([other, settled(parts)]);
  expect(pf.seen).toEqual([]);
});

test("front-ends that come and go do not keep the PF busy", async () => {
  const parts = await makeTarget();
  const { target, pf, rings } = parts;
  pf.seen.length = 0;
  for (let visit = 0; visit < 20; visit++) {
    target.standBy();
    await settled(parts);
    await target.release(rings);
  }
  expect(pf.seen.length).toBeLessThanOrEqual(4);
});

test("a silent PF keeps a front-end that goes for a second at most, and is not taken for dead", async () => {
  const parts = await makeTarget();
  const { target, pf, managed, rings, fn, lines } = parts;
  pf.answer = () => "silence";
  pf.seen.length = 0;
  target.standBy();
  await Bun.sleep(0);
  await target.release(rings);
  await settled(parts);
  expect(lines).toEqual([expect.stringMatching(/^debug: .*standing by did not end within 1\d\d\d ms/)]);
  expect(fn.statusWrites.at(-1)).toBe(0);
  expect(managed.admin.queue.state).toEqual({ kind: "ready" });
  expect(pf.seen.filter(({ name }) => name === "identity")).toEqual([]);
});

test("a start waits for a PF that has not answered in time, so that it is not stopped by what comes late", async () => {
  const parts = await makeTarget();
  const { target, pf, vf, fn, rings } = parts;
  const late: (() => void)[] = [];
  pf.answer = (command) => new Promise((resolve) => late.push(() => resolve(pf.honest(command))));
  target.standBy();
  await Bun.sleep(0);
  await target.release(rings);
  const started = target.start(wantedState(1, 7), new Map());
  await Bun.sleep(50);
  expect(fn.status).toBe(0);
  pf.answer = (command) => pf.honest(command);
  for (const answer of late) answer();
  await started;
  expect(vf.status).toBe("running");
  expect(vf.restored.map(({ indices }) => indices[0]?.lastAvail)).toEqual([7]);
});
