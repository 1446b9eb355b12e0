/** How quickly the programs answer, in the form that users install. */
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { RpcClient } from "../../src/rpc/client.ts";
import { Request } from "../../src/vhost-user/messages.ts";
import { Status } from "../../src/virtio/features.ts";
import { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { FrontendMemory } from "../kit/frontend/memory.ts";
import { InstalledMachine, install, installed } from "./installed.ts";
import { type Benchmark, type Figure, figure } from "./kit.ts";

const RUNS = 15;
/** New daemons for what a daemon does once. */
const DAEMONS = 5;
/** The first runs find cold files. */
const WARM_UP = 10;
/** Code is compiled as it is used, in three processes here; it comes to rest after some forty sessions. */
const SESSION_WARM_UP = 40;
const TIMEOUT = 30_000;
const MEMORY = [
  { gpa: 0, size: 0xa0000 },
  { gpa: 0x10_0000, size: 16 << 20 },
];

export default {
  name: "start",
  run: async (): Promise<Figure[]> => {
    await install();
    const daemon = await repeat(daemonStart);
    const first: number[] = [];
    for (let at = 0; at < DAEMONS; at++) first.push(await firstDriverOk());
    const { cli, frontend } = await onOneMachine();
    return [
      figure("start.daemon_ms", daemon, "ms", { at: "most", value: 138 }),
      figure("start.cli_ms", cli, "ms", { at: "most", value: 28 }),
      figure("start.connect_to_driver_ok_ms", frontend, "ms", { at: "most", value: 10 }),
      figure("start.first_connect_to_driver_ok_ms", first, "ms"),
    ];
  },
} satisfies Benchmark;

/** @returns what each run took, milliseconds */
async function repeat(run: () => Promise<number>, warmUp = WARM_UP): Promise<number[]> {
  const all: number[] = [];
  for (let at = 0; at < warmUp + RUNS; at++) all.push(await run());
  return all.slice(warmUp);
}

/** From the daemon's start as a process to its first answer. */
async function daemonStart(): Promise<number> {
  const directory = await mkdtemp(join(tmpdir(), "bench-start-"));
  const deadline = Deadline.after(TIMEOUT, "the first answer of the daemon");
  const begin = performance.now();
  const command = installed("vfe-vhostd", "--runtime-dir", directory, "--bus", directory);
  const daemon = Bun.spawn(command, { stdio: ["ignore", "pipe", "ignore"] });
  try {
    // "ready": from here on it can be asked.
    await deadline.race(daemon.stdout.getReader().read());
    using client = await RpcClient.connect(join(directory, "rpc.sock"), deadline);
    await client.call("version", {}, deadline);
    return performance.now() - begin;
  } finally {
    daemon.kill("SIGKILL");
    await daemon.exited;
    await rm(directory, { recursive: true });
  }
}

/** As driverOk, of a daemon and a software VF that have just been started. */
async function firstDriverOk(): Promise<number> {
  await using machine = await InstalledMachine.start(1);
  await machine.addVf(0, "server");
  return await driverOk(machine);
}

/** What is asked of a daemon that runs for long. */
async function onOneMachine(): Promise<{ cli: number[]; frontend: number[] }> {
  await using machine = await InstalledMachine.start(1);
  const cli = await repeat(() => commandLine(machine));
  await machine.addVf(0, "server");
  const frontend = await repeat(() => driverOk(machine), SESSION_WARM_UP);
  return { cli, frontend };
}

/** The process as a whole, from its start to its end. */
async function commandLine(machine: InstalledMachine): Promise<number> {
  const begin = performance.now();
  const command = installed("vfe-vhost-cli", "--runtime-dir", machine.runtimeDirectory, "version");
  const child = Bun.spawn(command, { stdio: ["ignore", "ignore", "inherit"] });
  if ((await child.exited) !== 0) throw new Error(`vfe-vhost-cli version ended with ${child.exitCode}`);
  return performance.now() - begin;
}

/** From the connection of a front-end that says what QEMU says to the status that shows its VF started. */
async function driverOk(machine: InstalledMachine): Promise<number> {
  await machine.idle(0);
  // A VM has its memory before its device is connected.
  const memory = new FrontendMemory(MEMORY);
  const begin = performance.now();
  using frontend = VhostUserFrontend.connect(machine.socket(0));
  frontend.memory = memory;
  frontend.replies = "as QEMU";
  await frontend.negotiate();
  await frontend.setupMemory([]);
  await frontend.startQueues(1);
  const status = await frontend.askU64(Request.GET_STATUS);
  if ((status & BigInt(Status.driverOk)) === 0n) throw new Error(`the status is 0x${status.toString(16)}`);
  const took = performance.now() - begin;
  // What is under way is finished: the next run meets a VF at rest.
  await frontend.stop({ order: "new" });
  return took;
}
