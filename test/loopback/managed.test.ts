import { describe, expect, test } from "bun:test";
import { readdirSync, readFileSync, readlinkSync } from "node:fs";
import { Deadline } from "../../src/base/deadline.ts";
import { VhostdError } from "../../src/base/errors.ts";
import { MANUAL_OPERATIONS } from "../../src/daemon/manual-operations.ts";
import { liveFds } from "../../src/native/fd.ts";
import { MemoryKeeper } from "../kit/memory-keeper.ts";
import { RegistryLab, type RegistryLabOptions } from "../kit/registry-lab.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";

/** What a PF can do for its VFs, and what is said where it cannot. */

/** The error that `action` ends in. */
async function failure(action: Promise<unknown>): Promise<VhostdError> {
  const error = await action.then(
    () => undefined,
    (thrown: unknown) => thrown,
  );
  if (!(error instanceof VhostdError)) throw new Error(`expected a VhostdError, there was ${error}`);
  return error;
}

/** What the process has open of others, and has made for them; its runtime opens and closes files of its own. */
function filesOf(pid: number): number {
  const links = readdirSync(`/proc/${pid}/fd`).map((fd) => {
    try {
      return readlinkSync(`/proc/${pid}/fd/${fd}`);
    } catch {
      return "closed meanwhile";
    }
  });
  return links.filter((link) => /memfd:|eventfd/.test(link)).length;
}

/** Everything that an add could leave behind, here and in vfe-softvf. */
function look({ softvf, keeper, registry, directory }: RegistryLab) {
  const maps = readFileSync(`/proc/${softvf.pid}/maps`, "utf8").split("\n");
  return {
    fds: liveFds(),
    records: keeper.keys,
    // Guest memory and admin queues.
    maps: maps.filter((line) => line.includes("memfd:")).length,
    fdsOfSoftvf: filesOf(softvf.pid),
    sockets: readdirSync(directory).filter((name) => name.endsWith(".sock")),
    pfs: registry.listPfs(),
  };
}

/** The same, when the other process has closed what it is about to close. */
async function holdings(lab: RegistryLab): Promise<ReturnType<typeof look>> {
  let seen = look(lab);
  return await Deadline.after(5_000, "a steady state").poll(async () => {
    const before = seen;
    await Bun.sleep(50);
    seen = look(lab);
    return Bun.deepEquals(seen, before) ? seen : undefined;
  }, 0);
}

describe("a PF that can move its VFs", () => {
  test("says so, and each VF does", async () => {
    await using lab = await RegistryLab.create();
    const { registry, pf, vf } = lab;
    const managed = { managed: true, migration: "vendor 1.0.0", admin_queue: "ready", reason: null };
    expect(await registry.addPf(pf)).toMatchObject(managed);
    expect(registry.listPfs()).toMatchObject([managed]);
    await lab.serve();
    expect(registry.vfInfo(vf)).toMatchObject({ mover: "vendor", managed: true, unmanaged_reason: null });
  }, 30_000);

  test("lets an operator move them by hand: what the guest asks for meanwhile is not lost", async () => {
    await using lab = await RegistryLab.create();
    const { registry, vf } = lab;
    await registry.addPf(lab.pf);
    await lab.serve();
    expect(await registry.moveVf(vf, "status")).toBe("init");
    using frontend = lab.dial();
    await lab.run(frontend);
    const { driver } = frontend.queues[0]!;
    const io = new VerifiedDisk().runOn(driver, 4);
    await io.progress(20);
    expect(await registry.moveVf(vf, "status")).toBe("running");
    for (const operation of ["quiesce", "freeze"] as const) {
      expect(await registry.moveVf(vf, operation)).toBe(operation === "quiesce" ? "quiesced" : "freezed");
      const { returned } = driver;
      await Bun.sleep(20);
      expect(driver.returned).toBe(returned);
      expect(await registry.moveVf(vf, "run")).toBe("running");
      await io.progress(20);
    }
    // A stop and a start find the device where the operator has put it.
    for (const operation of MANUAL_OPERATIONS) {
      await registry.moveVf(vf, operation);
      await frontend.resumeQueues(await frontend.stop({ order: "old" }));
      await io.progress(20);
    }
    // What the front-end was told of a stopped device stays true.
    const bases = await frontend.stop({ order: "new" });
    for (const operation of ["run", "quiesce", "freeze"] as const) {
      expect(await failure(registry.moveVf(vf, operation))).toMatchObject({ code: "busy" });
    }
    expect(await registry.moveVf(vf, "status")).toBe("freezed");
    expect(driver.submitted - driver.returned).toBe(4);
    await frontend.resumeQueues(bases);
    await io.progress(20);
    await io.stop();
  }, 30_000);
});

describe("a PF that cannot", () => {
  test("holds its VFs, and says why not more", async () => {
    await using lab = await RegistryLab.create({ migration: "none" });
    const { registry, pf, vf } = lab;
    const reason = "the PF does not offer ADMIN_VQ";
    const unmanaged = { managed: false, migration: null, admin_queue: "none", reason };
    expect(await registry.addPf(pf)).toMatchObject(unmanaged);
    expect(registry.listPfs()).toMatchObject([unmanaged]);
    await lab.serve();
    expect(registry.vfInfo(vf)).toMatchObject({ mover: "registers", managed: false, unmanaged_reason: reason });
    using frontend = lab.dial();
    await lab.run(frontend);
    await new VerifiedDisk().steps(frontend.queues[0]!.driver, 5);
    for (const operation of MANUAL_OPERATIONS) {
      expect(await failure(registry.moveVf(vf, operation))).toMatchObject({
        number: 95,
        message: expect.stringContaining(reason),
      });
    }
  }, 30_000);

  const QUICK: RegistryLabOptions = { deadlines: { admin: 1_000, attach: 1_500 } };
  const PF_FAULTS = [
    { fault: "retry", says: "refused identity of the PF: error (code 1)" },
    { fault: "fail", says: "refused identity of the PF: internal (code 5)" },
    { fault: "silence", says: "did not answer identity of the PF" },
  ];
  test("because its admin queue does not work is refused, leaves nothing behind, and can be added afterwards", async () => {
    await using lab = await RegistryLab.create(QUICK);
    const { registry, pf } = lab;
    await registry.addPf(pf);
    await registry.removePf(pf);
    const before = await holdings(lab);
    for (const { fault, says } of PF_FAULTS) {
      await lab.set(pf, { "admin-fault": `identity:${fault}` });
      expect(await failure(registry.addPf(pf))).toMatchObject({ number: 1012, message: expect.stringContaining(says) });
      expect(await holdings(lab)).toEqual(before);
    }
    await lab.set(pf, { "admin-fault": "" });
    expect(await registry.addPf(pf)).toMatchObject({ managed: true });
    await lab.serve();
    using frontend = lab.dial();
    await lab.run(frontend, 1, 0xffff);
    await new VerifiedDisk().steps(frontend.queues[0]!.driver, 5);
  }, 30_000);

  test("a function that stands still is given up in time, and added when it goes on", async () => {
    await using lab = await RegistryLab.create(QUICK);
    const { registry, pf } = lab;
    await registry.addPf(pf);
    await lab.serve();
    await registry.removeVf(lab.vf);
    const withPf = await holdings(lab);
    lab.softvf.signal("SIGSTOP");
    const stuck = await failure(lab.serve());
    lab.softvf.signal("SIGCONT");
    expect(stuck).toMatchObject({ number: 110, message: expect.stringContaining(lab.vf) });
    expect(await holdings(lab)).toEqual(withPf);
    await lab.serve();
    await registry.removeVf(lab.vf);
    expect(await holdings(lab)).toEqual(withPf);
  }, 30_000);
});

test("whatever makes an add fail, nothing of it stays, and the same add works when the cause is gone", async () => {
  await using lab = await RegistryLab.create();
  const { registry, pf, vf, keeper } = lab;
  const mount = lab.socket("later");
  const addVf = (socket = lab.socket(`${vf}.sock`)) => registry.addVf({ address: vf, socket, mode: "server" });
  const runGuest = async () => {
    using frontend = lab.dial();
    await lab.run(frontend, 1, 7);
    await new VerifiedDisk().steps(frontend.queues[0]!.driver, 5);
  };
  /** Another daemon on this machine. */
  using elsewhere = new MemoryKeeper();
  const other = lab.newRegistry(elsewhere);
  // What the programs keep from their first guest on is none of this.
  await registry.addPf(pf);
  await addVf();
  await runGuest();
  await registry.removeVf(vf);
  await registry.removePf(pf);

  const none = await holdings(lab);
  keeper.refused = "pf/";
  expect((await failure(registry.addPf(pf))).number).toBe(1041);
  expect(await holdings(lab)).toEqual(none);
  keeper.refused = undefined;
  await other.addPf(pf);
  expect((await failure(registry.addPf(pf))).message).toContain(pf);
  expect(registry.listPfs()).toEqual([]);
  await other.removePf(pf);
  expect(await holdings(lab)).toEqual(none);
  await registry.addPf(pf);

  const withPf = await holdings(lab);
  keeper.refused = "vf/";
  expect((await failure(addVf())).number).toBe(1041);
  expect(await holdings(lab)).toEqual(withPf);
  keeper.refused = undefined;
  expect((await failure(addVf(`${mount}/vhost.sock`))).number).toBe(1030);
  expect(await holdings(lab)).toEqual(withPf);
  expect(registry.listVfs(pf)).toEqual([]);

  await addVf();
  await runGuest();
  await registry.removeVf(vf);
  expect(await holdings(lab)).toEqual(withPf);
  await registry.removePf(pf);
  expect(await holdings(lab)).toEqual(none);
}, 30_000);
