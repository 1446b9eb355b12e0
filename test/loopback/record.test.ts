import { describe, expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import type { Json } from "../../src/base/json.ts";
import { parseVfRecord, type VfRecord } from "../../src/daemon/record.ts";
import { liveFds } from "../../src/native/fd.ts";
import { MOVERS } from "../kit/movers.ts";
import { RegistryLab } from "../kit/registry-lab.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";

/** Lets go of every object as a crash would, and makes a new registry from what the keeper has. */
async function rebuild(lab: RegistryLab): Promise<void> {
  await lab.registry.abandon();
  lab.registry = lab.newRegistry();
  await lab.registry.revive();
}

/** The keeper's record of the VF with a change, and what the registry makes of it. */
async function rebuildFrom(lab: RegistryLab, change: (record: VfRecord) => Json): Promise<void> {
  const key = `vf/${lab.vf}`;
  const stored = await lab.keeper.get(key);
  if (stored === undefined) throw new Error("the VF has no record");
  const borrowed = new Map([...stored.fds].map(([name, fd]) => [name, fd.number] as const));
  await lab.keeper.put(key, () => ({ record: change(parseVfRecord(stored.record)), fds: borrowed }));
  for (const fd of stored.fds.values()) fd[Symbol.dispose]();
  await rebuild(lab);
}

describe.each(MOVERS)("moved by $mover", ({ mover, migration }) => {
  test("a running VF goes on from its record and fds: no reset, no reconnect, verified I/O", async () => {
    const before = liveFds();
    {
      await using lab = await RegistryLab.create({ migration, softvf: ["--queues", "4"] });
      await lab.registry.addPf(lab.pf);
      using frontend = await lab.connect();
      await lab.run(frontend, 4);
      expect(lab.registry.vfInfo(lab.vf).mover).toBe(mover);
      const disk = new VerifiedDisk();
      const queue = frontend.queues[0]!.driver;
      await disk.steps(queue, 50);

      const load = disk.runOn(queue);
      for (let round = 0; round < 5; round++) {
        await rebuild(lab);
        const soFar = load.done;
        while (load.done < soFar + 20) await Bun.sleep(1);
        expect(lab.registry.vfInfo(lab.vf).state).toBe("running");
      }
      expect(await load.stop()).toBeGreaterThanOrEqual(100);

      // Memory can still be plugged: the domain's record came back with its files.
      expect(await frontend.addRegion(frontend.memory.add(8 * 2 ** 32, 2 << 20))).toBe(0n);

      // The session goes on too: a stop gives the indices that the rings have come to.
      const bases = await frontend.stop({ order: "old" });
      expect(bases[0]).toBe(disk.verified & 0xffff);
      await frontend.resumeQueues(bases);
      await disk.steps(queue, 20);
    }
    expect(liveFds()).toBe(before);
  }, 60_000);

  test("a session that cannot be rebuilt ends: nothing stays reachable, the VF says why, others go on", async () => {
    await using lab = await RegistryLab.create({ migration });
    await lab.registry.addPf(lab.pf);
    using frontend = await lab.connect();
    using other = await lab.connect(lab.vf2, "other.sock");
    await lab.run(frontend);
    await lab.run(other);
    const io = new VerifiedDisk(512).runOn(other.queues[0]!.driver);

    await rebuildFrom(lab, (record) => ({ ...record, session: { state: "what?" } }));
    await frontend.hungUp();
    await Deadline.after(5_000, "failure of the VF").poll(
      () => lab.registry.vfInfo(lab.vf).state === "failed" || undefined,
      1,
    );
    expect(lab.registry.vfInfo(lab.vf).reason).toContain("the stored session is not understood");
    const memory = await lab.keeper.get(`domain/vfio-user/${lab.vf}`);
    expect(memory?.fds.size ?? 0).toBe(0);
    await lab.registry.removeVf(lab.vf);
    const before = io.done;
    await Deadline.after(5_000, "I/O of the other VF").poll(() => io.done > before || undefined, 1);
    await io.stop();
  }, 30_000);

  test("a VF whose record is of another version is attached anew", async () => {
    await using lab = await RegistryLab.create({ migration });
    await lab.registry.addPf(lab.pf);
    using frontend = await lab.connect();
    await lab.run(frontend);
    await rebuildFrom(lab, (record) => ({ ...record, version: 99 }) as unknown as Json);
    await frontend.hungUp();
    // It is there as if it was added just now.
    expect(lab.registry.vfInfo(lab.vf)).toMatchObject({ state: "idle", connected: false, reason: null });
    await lab.registry.removeVf(lab.vf);
    expect((await lab.keeper.list()).toSorted()).toEqual([`pf/${lab.pf}`]);
    using again = await lab.connect(lab.vf, "again.sock");
    await lab.run(again);
    await new VerifiedDisk().steps(again.queues[0]!.driver, 5);
  }, 30_000);

  test("memory of a VF that is left out is let go, also in the record of the domain that others of its VM use", async () => {
    const uuid = "ee8b6429-eb1e-45e7-9dab-aff843b99075";
    await using lab = await RegistryLab.create({ migration });
    await lab.registry.addPf(lab.pf);
    using frontend = await lab.connect(lab.vf, "one.sock", uuid);
    using other = await lab.connect(lab.vf2, "two.sock", uuid);
    await frontend.negotiate();
    await frontend.setupMemory([{ gpa: 8 * 2 ** 32, size: 2 << 20 }]);
    await lab.run(other);
    await rebuildFrom(lab, (record) => ({ ...record, version: 99 }) as unknown as Json);
    const domain = await lab.keeper.get(`domain/vfio-user/${uuid}`);
    for (const fd of domain?.fds.values() ?? []) fd[Symbol.dispose]();
    expect(JSON.stringify(domain?.record)).not.toContain(lab.vf);
    expect(domain?.fds.size).toBe(2);
    await new VerifiedDisk().steps(other.queues[0]!.driver, 5);
  }, 30_000);

  test("the guest goes on while nobody is there, and afterwards", async () => {
    await using lab = await RegistryLab.create({ migration });
    await lab.registry.addPf(lab.pf);
    using frontend = await lab.connect();
    await lab.run(frontend);
    const io = new VerifiedDisk().runOn(frontend.queues[0]!.driver, 4);
    await io.progress(10);
    await lab.registry.abandon();
    await io.progress(100);
    lab.registry = lab.newRegistry();
    await lab.registry.revive();
    await io.progress(10);
    await io.stop();
  }, 30_000);

  test("an idle VF goes on waiting for its front-end", async () => {
    await using lab = await RegistryLab.create({ migration });
    await lab.registry.addPf(lab.pf);
    await lab.registry.addVf({ address: lab.vf, socket: lab.socket("server.sock"), mode: "server" });
    await rebuild(lab);
    expect(lab.registry.vfInfo(lab.vf)).toMatchObject({ state: "idle", mode: "server" });
    const { VhostUserFrontend } = await import("../kit/frontend/frontend.ts");
    using frontend = VhostUserFrontend.connect(lab.socket("server.sock"));
    await lab.run(frontend);
    await new VerifiedDisk().steps(frontend.queues[0]!.driver, 5);
  }, 30_000);

  test("every part of a record is plain data, and a damaged one is refused with the place", async () => {
    await using lab = await RegistryLab.create({ migration });
    await lab.registry.addPf(lab.pf);
    using frontend = await lab.connect();
    await lab.run(frontend);
    const stored = await lab.keeper.get(`vf/${lab.vf}`);
    const record = stored?.record as VfRecord;
    for (const fd of stored?.fds.values() ?? []) fd[Symbol.dispose]();
    expect(JSON.parse(JSON.stringify(record))).toEqual(record);
    expect(parseVfRecord(record)).toEqual(record);
    expect([...(stored?.fds.keys() ?? [])].toSorted()).toEqual(
      expect.arrayContaining(["dataPath:config-interrupt", "function:socket", "session:connection", "session:kick.0"]),
    );
    expect(() => parseVfRecord({ ...record, version: 2 } as never)).toThrow("/version");
    expect(() => parseVfRecord({ ...record, options: { address: 7 } } as never)).toThrow("/options");
  }, 30_000);
});

test("a guest that stands still goes on with memory that the process before had just let go of", async () => {
  await using lab = await RegistryLab.create();
  await lab.registry.addPf(lab.pf);
  using frontend = await lab.connect();
  await lab.run(frontend);
  const disk = new VerifiedDisk();
  const queue = frontend.queues[0]!.driver;
  await disk.steps(queue, 20);
  const bases = await frontend.stop({ order: "new" });
  // What the end of a session does: the domain's record says so, that of the VF does not yet.
  const [vf] = lab.registry["table"].liveVfs;
  await vf!.target.reset();
  await vf!["memory"].clear();
  await rebuild(lab);
  await frontend.resumeQueues(bases);
  await disk.steps(queue, 20);
  expect(lab.registry.vfInfo(lab.vf).state).toBe("running");
  expect(lab.warnings).toEqual([]);
}, 30_000);
