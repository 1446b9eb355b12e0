import { mkdir } from "node:fs/promises";
import { join } from "node:path";
import { Stack } from "../kit/guest/stack.ts";
import type { NetworkNamespace } from "../kit/network-namespace.ts";
import { output } from "./native.ts";
import { Testpmd, type TestpmdPlace } from "./net-testpmd.ts";

/** Where frames go between the two devices: straight from one to the other, or over a TAP for each and a bridge. */
export type Way = "wire" | "tap";

/** All of it runs on `cpu`. */
export interface BackendOptions extends TestpmdPlace {
  readonly way: Way;
  /** What there is of TAPs and bridges is in here. */
  readonly namespace: NetworkNamespace;
}

/** Two vhost-user network devices; what a front-end sends into one comes out of the other. */
export interface Backend extends AsyncDisposable {
  /** What it is called in the output. */
  readonly name: string;
  /** Both listen there. */
  readonly sockets: readonly [string, string];
  /** Before a run. */
  resume(): Promise<void>;
  /** After a run: until the next one it needs no CPU. */
  pause(): Promise<void>;
}

/** VFs of vfe-softvf, managed, through the daemon. */
export async function startOurs({ way, directory, namespace, cpu }: BackendOptions): Promise<Backend> {
  await mkdir(directory);
  await using undo = new AsyncDisposableStack();
  if (way === "tap") {
    for (const tap of ["ours0", "ours1"]) await namespace.addTap(tap);
    await bridge(namespace, "ours", ["ours0", "ours1"]);
  }
  const backend = way === "tap" ? ["--backend", "tap", "--tap", "ours{vf}"] : ["--backend", "wire"];
  const prefix = namespace.prefix;
  const stack = undo.use(
    await Stack.start({ directory, deviceClass: "net", vfs: 2, queues: 1, softvf: backend, prefix }),
  );
  await stack.startDaemon();
  const sockets = [join(directory, "0.sock"), join(directory, "1.sock")] as const;
  await stack.addVf(sockets[0], "--server");
  await stack.command("vf", "-a", stack.vfAddress(1), "-v", sockets[1], "--server");
  // Threads that are started later inherit it.
  for (const { pid } of [stack.softvf, stack.daemon]) await output(["taskset", "-acp", cpu, `${pid}`]);
  const parts = undo.move();
  return {
    name: `vfe-vhostd and vfe-softvf, ${way}`,
    sockets,
    resume: async () => {},
    pause: async () => {},
    [Symbol.asyncDispose]: () => parts.disposeAsync(),
  };
}

/** DPDK's vhost-user back-end. */
export async function startPeer(options: BackendOptions): Promise<Backend> {
  const { way, directory, namespace, cpu, otherCpu } = options;
  await mkdir(directory);
  const sockets = [join(directory, "0.sock"), join(directory, "1.sock")] as const;
  const [first, second] = sockets.map((socket, index) => `net_vhost${index},iface=${socket},queues=1`) as [
    string,
    string,
  ];
  const taps = ["peer0", "peer1"] as const;
  const devices =
    way === "wire" ? [first, second] : [first, `net_tap0,iface=${taps[0]}`, second, `net_tap1,iface=${taps[1]}`];
  await using undo = new AsyncDisposableStack();
  const prefix = namespace.prefix;
  const testpmd = undo.use(await Testpmd.start({ name: "backend", directory, cpu, otherCpu, devices, prefix }));
  if (way === "tap") await bridge(namespace, "peer", taps);
  undo.move();
  return {
    name: `${testpmd.version} net_vhost${way === "tap" ? " and net_tap" : ""} in testpmd`,
    sockets,
    resume: async () => void (await testpmd.command("start")),
    pause: async () => void (await testpmd.command("stop")),
    [Symbol.asyncDispose]: () => testpmd[Symbol.asyncDispose](),
  };
}

/** Nothing but the frames of the front-end passes: no IPv6, no multicast. */
async function bridge(namespace: NetworkNamespace, name: string, taps: readonly string[]): Promise<void> {
  await namespace.run("ip", "link", "add", name, "type", "bridge", "mcast_snooping", "0");
  for (const device of [name, ...taps]) {
    await namespace.run("sysctl", "-qw", `net.ipv6.conf.${device}.disable_ipv6=1`);
    if (device !== name) await namespace.run("ip", "link", "set", "dev", device, "master", name);
    await namespace.run("ip", "link", "set", "dev", device, "up");
  }
}
