import { mkdir, mkdtemp, readFile, rm, truncate, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { parsePciAddress } from "../../src/pci/address.ts";
import { RpcClient } from "../../src/rpc/client.ts";
import { controlSocket } from "../../src/softvf/config.ts";
import { vfAddress } from "../../src/softvf/topology.ts";
import { ROOT } from "../../tools/command.ts";
import { installPrograms } from "../../tools/package.ts";
import { Child } from "../kit/guest/child.ts";

const PROGRAMS = join(ROOT, ".cache/bench");
/** As many open files as the keeper's unit allows it. */
const KEEPER_FILES = 524_288;
const PF = parsePciAddress("0000:5a:00.0");
const DISK_SIZE = 1 << 20;
const TIMEOUT = 60_000;

type Parameters = Readonly<Record<string, unknown>>;

/** The programs in the form that users install, in a directory of their own. Made anew: never older than the sources. */
export async function install(): Promise<void> {
  await installPrograms(PROGRAMS, new Date().toISOString());
  // Text that is not on the disk yet would count as memory of those that run it.
  await Bun.spawn(["sync", "-f", PROGRAMS]).exited;
}

/** The command line of an installed program. */
export function installed(name: string, ...words: readonly string[]): string[] {
  return [join(PROGRAMS, name), ...words];
}

export interface MachineOptions {
  /** Of each VF; as many as vfe-softvf gives one unless said. */
  readonly queues?: number;
  /** Another daemon may go on where one has died. */
  readonly keeper?: boolean;
  /** Of each VF; 1 MiB of zeros unless said. */
  readonly makeDisk?: (path: string) => Promise<void>;
}

/** A daemon of the installed form, alone or with a software PF. */
export class InstalledMachine implements AsyncDisposable {
  private daemons = 0;
  private current: Child;

  private constructor(
    readonly directory: string,
    readonly softvf: Child | undefined,
    readonly keeper: Child | undefined,
  ) {
    this.current = this.startDaemon();
  }

  /** @param vfs of the software PF; there is none with 0 */
  static async start(vfs: number, options: MachineOptions = {}): Promise<InstalledMachine> {
    const directory = await mkdtemp(join(tmpdir(), "bench-"));
    await using undo = new AsyncDisposableStack();
    undo.defer(() => rm(directory, { recursive: true, force: true }));
    const softvf = vfs === 0 ? undefined : undo.use(await startSoftvf(directory, vfs, options));
    await mkdir(join(directory, "run"));
    const keeper = options.keeper === true ? undo.use(await startKeeper(directory)) : undefined;
    const machine = new InstalledMachine(directory, softvf, keeper);
    undo.defer(() => machine.daemon[Symbol.asyncDispose]());
    await machine.daemon.line(/^ready /m, TIMEOUT);
    if (softvf !== undefined) await machine.call("pf.add", { device: PF });
    undo.move();
    return machine;
  }

  /** The one that was started last. */
  get daemon(): Child {
    return this.current;
  }

  /** Another daemon, in the place of one that has died. Returns at once. */
  startDaemon(): Child {
    const name = "vfe-vhostd";
    const words = ["--runtime-dir", this.runtimeDirectory, "--bus", join(this.directory, "softvf/devices")];
    this.current = start(this.directory, name, words, `${name}.${this.daemons++}`);
    return this.current;
  }

  /** Where the daemon's control socket is. */
  get runtimeDirectory(): string {
    return join(this.directory, "run");
  }

  /** The vhost-user socket of a VF. */
  socket(vf: number): string {
    return join(this.directory, `vhost-${vf}.sock`);
  }

  /** @param more parameters of vf.add */
  async addVf(vf: number, mode: "client" | "server", more: Parameters = {}): Promise<void> {
    await this.call("vf.add", { device: vfAddress(PF, vf), socket: this.socket(vf), mode, ...more });
  }

  call(method: string, params: Parameters): Promise<unknown> {
    return call(join(this.runtimeDirectory, "rpc.sock"), method, params);
  }

  /** Asks the software PF's process. */
  callSoftvf(method: string, params: Parameters): Promise<unknown> {
    return call(controlSocket(join(this.directory, "softvf")), method, params);
  }

  /** Changes live options of the PF. */
  async setPf(options: Parameters): Promise<void> {
    await this.callSoftvf("set", { address: PF, options });
  }

  /** Waits until no front-end is connected to the VF and nothing of the last one is left. */
  async idle(vf: number): Promise<void> {
    const device = vfAddress(PF, vf);
    await Deadline.after(TIMEOUT, `end of the session of ${device}`).poll(async () => {
      const info = (await this.call("vf.info", { device })) as { state: string; connected: boolean };
      return info.state === "idle" && !info.connected ? true : undefined;
    }, 10);
  }

  /** Memory that the daemon has resident, its program's pages included. Bytes. */
  async residentMemory(): Promise<number> {
    // setpriv has become the daemon: they have one pid.
    const status = await readFile(`/proc/${this.daemon.pid}/status`, "utf8");
    const kib = /^VmRSS:\s+(\d+) kB$/m.exec(status)?.[1];
    if (kib === undefined) throw new Error(`/proc/${this.daemon.pid}/status has no VmRSS`);
    return Number(kib) * 1024;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // The keeper first: without it the daemon lets go of everything.
    await this.keeper?.[Symbol.asyncDispose]();
    await this.daemon[Symbol.asyncDispose]();
    await this.softvf?.[Symbol.asyncDispose]();
    await rm(this.directory, { recursive: true, force: true });
  }
}

async function call(socket: string, method: string, params: Parameters): Promise<unknown> {
  const deadline = Deadline.after(TIMEOUT, method);
  using client = await RpcClient.connect(socket, deadline);
  return await client.call(method, params, deadline);
}

/** As its unit does, with all the settings that matter here. */
async function startKeeper(directory: string): Promise<Child> {
  const environment = { BUN_JSC_forceRAMSize: "33554432" };
  const command = installed("vfe-vhostd-ha", "--runtime-dir", join(directory, "run"));
  const limited = ["bash", "-c", `ulimit -n ${KEEPER_FILES} 2> /dev/null; exec "$@"`, "limited", ...command];
  return await ready(
    new Child(limited, { name: "vfe-vhostd-ha", log: join(directory, "vfe-vhostd-ha.log"), environment }),
  );
}

async function startSoftvf(
  directory: string,
  vfs: number,
  { queues, makeDisk = makeEmptyDisk }: MachineOptions,
): Promise<Child> {
  for (let vf = 0; vf < vfs; vf++) await makeDisk(join(directory, `disk-${vf}`));
  const options = ["--pf", PF, "--class", "blk", "--vfs", `${vfs}`, "--disk", join(directory, "disk-{vf}")];
  const ofEach = queues === undefined ? [] : ["--queues", `${queues}`];
  return await ready(
    start(directory, "vfe-softvf", [...options, ...ofEach, "--runtime-dir", join(directory, "softvf")]),
  );
}

async function makeEmptyDisk(path: string): Promise<void> {
  await writeFile(path, "");
  await truncate(path, DISK_SIZE);
}

async function ready(child: Child): Promise<Child> {
  try {
    await child.line(/^ready /m, TIMEOUT);
    return child;
  } catch (error) {
    await child[Symbol.asyncDispose]();
    throw error;
  }
}

function start(directory: string, name: string, words: readonly string[], log = name): Child {
  return new Child(installed(name, ...words), { name, log: join(directory, `${log}.log`) });
}
