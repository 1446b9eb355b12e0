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
const PF = parsePciAddress("0000:5a:00.0");
const DISK_SIZE = 1 << 20;
const TIMEOUT = 60_000;

type Parameters = Readonly<Record<string, unknown>>;

/** The programs in the form that users install, in a directory of their own. Made anew: never older than the sources. */
export async function install(): Promise<void> {
  await installPrograms(PROGRAMS, new Date().toISOString());
}

/** The command line of an installed program. */
export function installed(name: string, ...words: readonly string[]): string[] {
  return [join(PROGRAMS, name), ...words];
}

/** A daemon of the installed form, alone or with a software PF. */
export class InstalledMachine implements AsyncDisposable {
  private constructor(
    readonly directory: string,
    private readonly softvf: Child | undefined,
    readonly daemon: Child,
  ) {}

  /** @param vfs of the software PF; there is none with 0 */
  static async start(vfs: number): Promise<InstalledMachine> {
    const directory = await mkdtemp(join(tmpdir(), "bench-"));
    await using undo = new AsyncDisposableStack();
    undo.defer(() => rm(directory, { recursive: true, force: true }));
    const softvf = vfs === 0 ? undefined : undo.use(await startSoftvf(directory, vfs));
    const runtime = join(directory, "run");
    await mkdir(runtime);
    const daemon = undo.use(
      start(directory, "vfe-vhostd", "--runtime-dir", runtime, "--bus", join(directory, "softvf/devices")),
    );
    await daemon.line(/^ready /m, TIMEOUT);
    const machine = new InstalledMachine(directory, softvf, daemon);
    if (softvf !== undefined) await machine.call("pf.add", { device: PF });
    undo.move();
    return machine;
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

async function startSoftvf(directory: string, vfs: number): Promise<Child> {
  for (let vf = 0; vf < vfs; vf++) {
    await writeFile(join(directory, `disk-${vf}`), "");
    await truncate(join(directory, `disk-${vf}`), DISK_SIZE);
  }
  const options = ["--pf", PF, "--class", "blk", "--vfs", `${vfs}`, "--disk", join(directory, "disk-{vf}")];
  const softvf = start(directory, "vfe-softvf", ...options, "--runtime-dir", join(directory, "softvf"));
  try {
    await softvf.line(/^ready /m, TIMEOUT);
    return softvf;
  } catch (error) {
    await softvf[Symbol.asyncDispose]();
    throw error;
  }
}

function start(directory: string, name: string, ...words: readonly string[]): Child {
  return new Child(installed(name, ...words), { name, log: join(directory, `${name}.log`) });
}
