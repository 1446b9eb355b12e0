import { expect, test } from "bun:test";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { silentLogger } from "../../src/base/log.ts";
import { DeviceRegistry } from "../../src/daemon/registry.ts";
import { liveFds } from "../../src/native/fd.ts";
import { Bus } from "../../src/pci/bus.ts";
import type { DeviceClass, Plugin } from "../../src/plugin.ts";
import { BUILT_IN_PLUGINS, PluginRegistry } from "../../src/plugin-host.ts";
import { ProtocolFeature } from "../../src/vhost-user/messages.ts";
import { featureBits } from "../../src/virtio/features.ts";
import { FrontendListener, type VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { MOVERS } from "../kit/movers.ts";
import { RegistryLab } from "../kit/registry-lab.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";

/** Disks with a link, which is down while their size is an odd number of sectors. */

const SIZE = 64 << 20;
const SECTOR = 512;
const link = (up: boolean) => ({ size: up ? SIZE : SIZE + SECTOR });
const withoutConfig = ~featureBits(ProtocolFeature.CONFIG);

async function labWithLinks(migration: (typeof MOVERS)[number]["migration"]): Promise<RegistryLab> {
  const lab = await RegistryLab.create({ migration, vfs: 1 });
  const builtIn = await PluginRegistry.load({ builtIn: BUILT_IN_PLUGINS, plugins: [] }, silentLogger);
  const linkUp: DeviceClass["linkUp"] = ({ capacity }) => BigInt(capacity ?? 0) % 2n === 0n;
  const plugins = new PluginRegistry();
  const linked: Plugin = {
    name: "linked",
    apiVersion: 1,
    setup(host) {
      host.deviceClass({ ...builtIn.deviceClassById(2)!, linkUp });
      host.adoption(builtIn.adoption!);
    },
  };
  plugins.register(linked, "the test");
  lab.newRegistry = (keeper = lab.keeper) => {
    const bus = new Bus([join(lab.directory, "softvf/devices")]);
    return new DeviceRegistry({ bus, plugins, keeper, log: silentLogger });
  };
  lab.registry = lab.newRegistry();
  await lab.registry.addPf(lab.pf);
  return lab;
}

/** Runs a front-end that is told of configuration changes only where it says so. */
async function run(frontend: VhostUserFrontend, protocolFeatures = withoutConfig): Promise<void> {
  await frontend.negotiate({ protocolFeatures });
  await frontend.setupMemory([{ gpa: 0, size: 40 << 20 }]);
  await frontend.startQueues(1);
}

async function reason(lab: RegistryLab, wanted: string | null): Promise<void> {
  await Deadline.after(10_000, `the reason "${wanted}"`).poll(() => {
    const seen = lab.registry.vfInfo(lab.vf).reason;
    return (wanted === null ? seen === null : seen?.includes(wanted)) || undefined;
  }, 2);
}

test("a managed VF whose link goes down hangs up, turns its guest away until it is up, and goes on then", async () => {
  await using lab = await labWithLinks("vendor");
  await lab.serve();
  const disk = new VerifiedDisk();
  const fds = liveFds();
  {
    using frontend = lab.dial();
    await run(frontend);
    const queue = frontend.queues[0]!.driver;
    await disk.steps(queue, 5);
    await lab.set(lab.vf, link(false));
    await frontend.hungUp();
    await reason(lab, `(process ${process.pid}) is turned away`);
    expect(lab.registry.vfInfo(lab.vf).state).toBe("idle");
    using again = lab.dial();
    await again.hungUp();
    // Not forgotten by a new process either.
    await lab.registry.abandon();
    lab.registry = lab.newRegistry();
    await lab.registry.revive();
    await reason(lab, `(process ${process.pid}) is turned away`);
    using third = lab.dial();
    await third.hungUp();
    await lab.set(lab.vf, link(true));
    await reason(lab, null);
  }
  using frontend = lab.dial();
  await run(frontend);
  await disk.steps(frontend.queues[0]!.driver, 5);
  frontend[Symbol.dispose]();
  await lab.idle();
  expect(liveFds()).toBe(fds);
}, 30_000);

test("the daemon as client: the VMM's socket is left alone until the link is up", async () => {
  await using lab = await labWithLinks("vendor");
  using listener = new FrontendListener(lab.socket("vhost.sock"));
  await lab.registry.addVf({ address: lab.vf, socket: lab.socket("vhost.sock"), mode: "client" });
  {
    using frontend = await listener.accept();
    await run(frontend);
    await lab.set(lab.vf, link(false));
    await frontend.hungUp();
    using again = await listener.accept();
    await again.hungUp();
    expect(lab.registry.vfInfo(lab.vf)).toMatchObject({ state: "idle", connected: false });
  }
  await lab.set(lab.vf, link(true));
  await reason(lab, null);
  // Connections that were turned away before may still wait to be accepted.
  for (let served = false; !served; ) {
    using frontend = await listener.accept();
    served = await run(frontend).then(
      () => true,
      () => false,
    );
    if (served) await lab.running();
  }
}, 30_000);

test.each(MOVERS)(
  "moved by $mover: a guest that is told of changes stays",
  async ({ migration }) => {
    await using lab = await labWithLinks(migration);
    using frontend = await lab.connect();
    await run(frontend, ~0n);
    await lab.set(lab.vf, link(false));
    await frontend.backendRequests!.wait(1);
    await reason(lab, "its guest sees it");
    await lab.set(lab.vf, link(true));
    await frontend.backendRequests!.wait(2);
    await reason(lab, null);
    await new VerifiedDisk().steps(frontend.queues[0]!.driver, 5);
  },
  30_000,
);

test("a VF that could not go on keeps its guest, and says that it does not know", async () => {
  await using lab = await labWithLinks("none");
  using frontend = await lab.connect();
  await run(frontend);
  await lab.set(lab.vf, link(false));
  await reason(lab, "its guest does not see it");
  await new VerifiedDisk().steps(frontend.queues[0]!.driver, 5);
}, 30_000);

test("a guest that starts while the link is down is served; what goes down again under it is a change", async () => {
  await using lab = await labWithLinks("vendor");
  await lab.set(lab.vf, link(false));
  using frontend = await lab.connect();
  await reason(lab, "the link is down");
  await run(frontend);
  await reason(lab, "its guest does not see it");
  await new VerifiedDisk().steps(frontend.queues[0]!.driver, 5);
  await lab.set(lab.vf, link(true));
  await reason(lab, null);
  await lab.set(lab.vf, link(false));
  await frontend.hungUp();
}, 30_000);
