import { describe, expect, test } from "bun:test";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { VhostdError } from "../../src/base/errors.ts";
import { silentLogger } from "../../src/base/log.ts";
import { DeviceRegistry } from "../../src/daemon/registry.ts";
import { liveFds } from "../../src/native/fd.ts";
import { parsePciAddress } from "../../src/pci/address.ts";
import { Bus } from "../../src/pci/bus.ts";
import type { Plugin } from "../../src/plugin.ts";
import { BUILT_IN_PLUGINS, PluginRegistry } from "../../src/plugin-host.ts";
import { FeatureBit, featureBits } from "../../src/virtio/features.ts";
import { FrontendListener } from "../kit/frontend/frontend.ts";
import { MOVERS } from "../kit/movers.ts";
import { RegistryLab } from "../kit/registry-lab.ts";
import { rejection } from "../kit/rejection.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";

/** The number of the error that `action` ends in. */
async function failure(action: Promise<unknown>): Promise<number> {
  const error = await action.then(
    () => undefined,
    (thrown: unknown) => thrown,
  );
  if (!(error instanceof VhostdError)) throw new Error(`expected a VhostdError, there was ${error}`);
  return error.number;
}

describe.each(MOVERS)("moved by $mover", ({ mover, migration }) => {
  test("what an operator gets wrong is refused by its number, and leaves nothing behind", async () => {
    await using lab = await RegistryLab.create({ migration });
    const { registry, pf, vf, vf2 } = lab;
    const add = (address = vf, name = "a.sock") =>
      registry.addVf({ address, socket: lab.socket(name), mode: "client" as const });
    const nowhere = parsePciAddress("0000:77:00.0");

    expect(await failure(add())).toBe(1001); // before its PF
    expect(await failure(registry.addPf(nowhere))).toBe(1001);
    expect(await failure(registry.addPf(vf))).toBe(1001); // a VF is no PF
    await registry.addPf(pf);
    const fds = liveFds();
    expect(await failure(registry.addPf(pf))).toBe(1008);
    expect(await failure(add(nowhere))).toBe(1003);
    expect(await failure(add(pf))).toBe(1003); // a PF is no VF
    expect(await failure(add(vf, "x".repeat(120)))).toBe(1030);
    expect(await failure(add(vf, "disk.img"))).toBe(1030); // a file, no socket
    for (const socket of ["", "relative.sock"]) {
      expect(await failure(registry.addVf({ address: vf, socket, mode: "client" }))).toBe(1007);
    }
    expect(liveFds()).toBe(fds);

    const adds = await Promise.allSettled([add(), add(), add(vf, "b.sock")]);
    expect(adds.filter(({ status }) => status === "fulfilled")).toHaveLength(1);
    expect(await failure(add())).toBe(1014);
    const taken = registry.vfInfo(vf).socket_file;
    expect(await failure(registry.addVf({ address: vf2, socket: taken, mode: "client" }))).toBe(1038);
    expect(await failure(registry.removePf(pf))).toBe(1013);
    expect(await failure(registry.removeVf(vf2))).toBe(1003);
    await registry.removeVf(vf);
    expect(await failure(Promise.resolve().then(() => registry.vfInfo(vf)))).toBe(1003);
    expect(liveFds()).toBe(fds);
    await registry.removePf(pf);
    expect(registry.listPfs()).toEqual([]);
  }, 30_000);

  test("VFs without a VM UUID never share memory, an empty one is none, and nothing else is taken for one", async () => {
    await using lab = await RegistryLab.create({ migration });
    const { registry, pf, vf, vf2 } = lab;
    await registry.addPf(pf);
    const add = (address: typeof vf, uuid: string) =>
      registry.addVf({ address, socket: lab.socket(address), mode: "client", uuid });
    expect(await failure(add(vf, "vm-1"))).toBe(1007);
    await add(vf, "");
    await add(vf2, "");
    expect(registry.vfInfo(vf).vm_uuid).toBe("");
    using listener = new FrontendListener(lab.socket(vf));
    using frontend = await listener.accept();
    await lab.run(frontend);
    expect((await lab.keeper.list()).filter((key) => key.startsWith("domain/"))).toEqual([`domain/vfio-user/${vf}`]);
  }, 30_000);

  test("a socket that cannot be made refuses the VF and leaves nothing behind", async () => {
    await using lab = await RegistryLab.create({ migration });
    const { registry, pf, vf } = lab;
    await registry.addPf(pf);
    const events: unknown[] = [];
    using _handler = registry.onEvent(({ state }) => events.push(state));
    const add = (socket: string) => registry.addVf({ address: vf, socket, mode: "server" });
    expect(await failure(add(lab.socket("no/such/directory.sock")))).toBe(1030);
    using _taken = new FrontendListener(lab.socket("taken.sock"));
    expect(await failure(add(lab.socket("taken.sock")))).toBe(1038);
    expect(await lab.keeper.list()).toEqual([`pf/${pf}`]);
    expect(events.at(-1)).toBe("absent");
    await add(lab.socket("fine.sock"));
    expect(registry.vfInfo(vf).state).toBe("idle");
  }, 30_000);

  test("why a front-end was turned away is seen with the VF, until one runs", async () => {
    await using lab = await RegistryLab.create({ migration });
    const { registry, vf } = lab;
    await registry.addPf(lab.pf);
    using listener = new FrontendListener(lab.socket("vhost.sock"));
    const events: unknown[] = [];
    using _handler = registry.onEvent(({ reason }) => events.push(reason));
    await registry.addVf({ address: vf, socket: lab.socket("vhost.sock"), mode: "client" });
    {
      using legacy = await listener.accept();
      await legacy.negotiate({ features: ~featureBits(FeatureBit.version1) });
      await legacy.setupMemory([{ gpa: 0, size: 8 << 20 }]);
      await legacy.startQueues(1).catch(() => {});
      await legacy.hungUp();
    }
    using frontend = await listener.accept();
    expect(registry.vfInfo(vf).reason).toContain("disable-legacy=on");
    expect(events.at(-1)).toBe(registry.vfInfo(vf).reason);
    await lab.run(frontend);
    expect(registry.vfInfo(vf).reason).toBeNull();
  }, 30_000);

  test("the function's process dies: that VF fails and says so, can be removed, and added again", async () => {
    const lab = await RegistryLab.create({ migration });
    await using other = await RegistryLab.create({ migration });
    try {
      await lab.registry.addPf(lab.pf);
      await other.registry.addPf(other.pf);
      using frontend = await lab.connect();
      using bystander = await other.connect();
      await lab.run(frontend);
      await other.run(bystander);
      const io = new VerifiedDisk().runOn(bystander.queues[0]!.driver);
      await lab.softvf.kill();
      await frontend.hungUp();
      const info = lab.registry.vfInfo(lab.vf);
      expect(info.state).toBe("failed");
      expect(info.reason).toContain("0000:5a:00.1");
      // Its connection is another one.
      const pfGone = () => lab.registry.listPfs()[0]?.reason?.includes("hung up") || undefined;
      await Deadline.after(5_000, "the end of the PF to be seen").poll(pfGone, 5);
      await lab.registry.removeVf(lab.vf);
      await lab.registry.removePf(lab.pf);
      expect(await io.stop()).toBeGreaterThan(0);
    } finally {
      await lab[Symbol.asyncDispose]();
    }
  }, 30_000);

  test("a front-end that vanishes frees everything, and the next one begins anew, twenty times", async () => {
    await using lab = await RegistryLab.create({ migration });
    await lab.registry.addPf(lab.pf);
    await lab.serve();
    const disk = new VerifiedDisk(0, 256);
    /** What becomes of a write that the front-end did not live to see is open, so these have blocks of their own. */
    const abandoned = new VerifiedDisk(256, 256);
    const idle = liveFds();
    for (let round = 0; round < 20; round++) {
      using frontend = lab.dial();
      await lab.run(frontend);
      expect(lab.registry.vfInfo(lab.vf).mover).toBe(mover);
      await disk.steps(frontend.queues[0]!.driver, 5);
      // In the middle of requests.
      for (let i = 0; i < 8; i++) abandoned.step(frontend.queues[0]!.driver).catch(() => {});
    }
    expect(disk.verified).toBe(100);
    await lab.idle();
    expect(liveFds()).toBe(idle);
  }, 60_000);
});

test("the counters of a VF are those of its guest's queues, without the function's own control queue", async () => {
  await using lab = await RegistryLab.create({
    className: "net",
    vfs: 1,
    softvf: ["--backend", "echo", "--queues", "2"],
  });
  await lab.registry.addPf(lab.pf);
  await lab.serve();
  expect(lab.registry.vfInfo(lab.vf).queue_num).toBe(4);
  // No driver runs it, so it tells nobody of the change.
  await lab.set(lab.vf, { mtu: 3000 });
  expect(await lab.registry.vfStats(lab.vf)).toHaveLength(4);
  expect(lab.registry.vfInfo(lab.vf).config["mtu"]).toBe("3000");
  expect((await lab.stats()).length).toBeGreaterThan(4);
  await lab.softvf.kill();
  await Deadline.after(5_000, "failure of the VF").poll(
    () => lab.registry.vfInfo(lab.vf).state === "failed" || undefined,
    1,
  );
  expect(await lab.registry.vfStats(lab.vf)).toBeNull();
}, 30_000);

test("VFs of a class that cannot describe them are added and listed all the same", async () => {
  await using lab = await RegistryLab.create({ vfs: 2 });
  const builtIn = await PluginRegistry.load({ builtIn: BUILT_IN_PLUGINS, plugins: [] }, silentLogger);
  const plugins = new PluginRegistry();
  const describe = () => {
    throw new Error("what a strange device");
  };
  const setup: Plugin["setup"] = (host) => host.deviceClass({ ...builtIn.deviceClassById(2)!, describe });
  plugins.register({ name: "speechless", apiVersion: 1, setup }, "the test");
  const bus = new Bus([join(lab.directory, "softvf/devices")]);
  lab.registry = new DeviceRegistry({ bus, plugins, keeper: lab.keeper, log: silentLogger });
  await lab.registry.addPf(lab.pf);
  await lab.serve(lab.vf);
  await lab.serve(lab.vf2);
  const listed = lab.registry.listVfs(lab.pf).map(({ vf, state, config }) => ({ vf, state, config }));
  expect(listed).toEqual([lab.vf, lab.vf2].map((vf) => ({ vf, state: "idle", config: {} })));
  await lab.registry.removeVf(lab.vf);
  await lab.serve(lab.vf);
}, 30_000);

test("VFs whose PF is not in service serve guests unmanaged, before, beside and after it", async () => {
  await using lab = await RegistryLab.create();
  const { registry, pf, vf, vf2 } = lab;
  const refused = await rejection(lab.serve());
  expect(refused).toMatchObject({ number: 1001, fix: expect.stringContaining("--unmanaged") });
  const place = { address: vf, socket: lab.socket(`${vf}.sock`), mode: "server" } as const;
  expect(await registry.addVf({ ...place, unmanaged: true })).toMatchObject({ pf, managed: false, mover: "registers" });
  expect(
    await registry.addVf({ address: vf2, socket: lab.socket("2"), mode: "server", unmanaged: true }),
  ).toBeDefined();
  {
    using frontend = lab.dial();
    await lab.run(frontend);
    const disk = new VerifiedDisk();
    await disk.steps(frontend.queues[0]!.driver, 20);
    const bases = await frontend.stop({ order: "old" });
    await frontend.resumeQueues(bases);
    await disk.steps(frontend.queues[0]!.driver, 20);
  }
  await lab.idle();
  expect(registry.vfInfo(vf)).toMatchObject({ interface: "vfio-user", iommu_group: null, host_notifier: false });

  await registry.removeVf(vf2);
  expect(registry.listVfs().map((one) => one.vf)).toEqual([vf]);
  expect(await failure(registry.addPf(vf))).toBe(1008);
  await registry.removeVf(vf);
  await registry.addPf(pf);
  expect(await registry.addVf({ ...place, unmanaged: true })).toMatchObject({ managed: false });
  expect(await failure(registry.removePf(pf))).toBe(1013);
  await registry.removeVf(vf);
  await registry.removePf(pf);
}, 30_000);
