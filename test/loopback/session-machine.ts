import { mkdirSync, mkdtempSync, readdirSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { type PciAddress, parsePciAddress } from "../../src/pci/address.ts";
import { RpcClient } from "../../src/rpc/client.ts";
import { vfAddress } from "../../src/softvf/topology.ts";
import { blkResult, readRequest, SECTOR, writeRequest } from "../kit/blk-requests.ts";
import { FrontendListener, type FrontendQueue, type VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { Child } from "../kit/guest/child.ts";
import type { Migration } from "../kit/movers.ts";

const BIN = join(import.meta.dir, "../../bin");
const PF = parsePciAddress("0000:5a:00.0");
const START_TIMEOUT = 15_000;

/** Bytes of each disk. */
export const DISK_SIZE = 8 << 20;
const MEMORY = [
  { gpa: 0, size: 0xa0000 },
  { gpa: 0x10_0000, size: 16 << 20 },
];

export interface MachineOptions {
  readonly vfs: number;
  /** Of each VF. */
  readonly queues: number;
  /** Whether the PF can move its VFs' state. "vendor" unless said. */
  readonly migration?: Migration;
  /** Of both programs, beside that of the tests. */
  readonly environment?: Readonly<Record<string, string>>;
}

/** vfe-softvf with block VFs and the daemon, two processes, in a directory of their own. */
export class Machine implements AsyncDisposable {
  readonly pf = PF;

  private constructor(
    readonly directory: string,
    readonly softvf: Child,
    readonly daemon: Child,
  ) {}

  static async start({ vfs, queues, migration = "vendor", environment = {} }: MachineOptions): Promise<Machine> {
    const directory = mkdtempSync(join(tmpdir(), "session-"));
    for (let vf = 0; vf < vfs; vf++) {
      writeFileSync(join(directory, `disk-${vf}`), "");
      truncateSync(join(directory, `disk-${vf}`), DISK_SIZE);
    }
    mkdirSync(join(directory, "run"));
    const softvf = program(directory, "vfe-softvf", environment, [
      ...["--pf", PF, "--class", "blk", "--vfs", `${vfs}`, "--queues", `${queues}`],
      ...["--disk", join(directory, "disk-{vf}"), "--runtime-dir", join(directory, "softvf")],
      ...["--migration", migration],
    ]);
    await softvf.line(/^ready /m, START_TIMEOUT);
    const daemon = program(directory, "vhostd", environment, [
      ...["--runtime-dir", join(directory, "run"), "--bus", join(directory, "softvf/devices")],
    ]);
    await daemon.line(/^ready /m, START_TIMEOUT);
    const machine = new Machine(directory, softvf, daemon);
    await machine.call("pf.add", { device: PF });
    return machine;
  }

  address(vf: number): PciAddress {
    return vfAddress(PF, vf);
  }

  socket(vf: number): string {
    return join(this.directory, `vhost-${vf}.sock`);
  }

  async addVf(vf: number, mode: "client" | "server"): Promise<void> {
    await this.call("vf.add", { device: this.address(vf), socket: this.socket(vf), mode });
  }

  async call(method: string, params: Readonly<Record<string, unknown>>): Promise<unknown> {
    using client = await this.client();
    return await client.call(method, params, Deadline.after(START_TIMEOUT, method));
  }

  /** A connection to the control socket. */
  async client(): Promise<RpcClient> {
    return await RpcClient.connect(join(this.directory, "run/rpc.sock"), Deadline.after(START_TIMEOUT, "connect"));
  }

  /** A property of the VF's disk, as an operator of the software PF sets it. */
  async setDisk(vf: number, property: string): Promise<void> {
    const name = `set-${Date.now()}`;
    const words = ["set", this.address(vf), property, "--runtime-dir", join(this.directory, "softvf")];
    await using child = program(this.directory, "vfe-softvf", {}, words, name);
    if ((await child.exited) !== 0) throw new Error(child.tail());
  }

  /** Waits until no session of this VF is left. */
  async idle(vf: number): Promise<void> {
    await Deadline.after(10_000, `end of the session of ${this.address(vf)}`).poll(async () => {
      const info = (await this.call("vf.info", { device: this.address(vf) })) as { state: string; connected: boolean };
      return info.state === "idle" && !info.connected ? true : undefined;
    }, 10);
  }

  /** Open fds of the daemon when these VFs have no session and nothing else is under way. */
  async steadyFds(idleVfs: readonly number[]): Promise<number> {
    for (const vf of idleVfs) await this.idle(vf);
    let count = 0;
    return await Deadline.after(10_000, "a steady number of fds").poll(async () => {
      const before = count;
      count = readdirSync(`/proc/${this.daemon.pid}/fd`).length;
      await Bun.sleep(50);
      return count === before ? count : undefined;
    }, 50);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.daemon[Symbol.asyncDispose]();
    await this.softvf[Symbol.asyncDispose]();
    rmSync(this.directory, { recursive: true });
  }
}

/** The next connection of the daemon to this VF's socket. */
export async function acceptFrontend(machine: Machine, vf: number): Promise<VhostUserFrontend> {
  using listener = new FrontendListener(machine.socket(vf));
  return await listener.accept();
}

export async function startDisk(frontend: VhostUserFrontend, queues: number): Promise<void> {
  await frontend.negotiate();
  await frontend.setupMemory(MEMORY);
  await frontend.startQueues(queues, { size: 64 });
}

/** Writes `sectors` sectors of a pattern at `sector`, reads them back and compares. */
export async function writeAndVerify({ driver }: FrontendQueue, sector: number, sectors = 8): Promise<void> {
  const data = pattern(sector, sectors);
  const written = writeRequest(sector, data);
  const { status } = blkResult(await driver.request(written.readable, written.writable));
  if (status !== 0) throw new Error(`write of sector ${sector} ended with status ${status}`);
  await verify({ driver }, sector, sectors);
}

/** Reads what `writeAndVerify` has written. */
export async function verify({ driver }: Pick<FrontendQueue, "driver">, sector: number, sectors = 8): Promise<void> {
  const wanted = readRequest(sector, sectors * SECTOR);
  const { status, data } = blkResult(await driver.request(wanted.readable, wanted.writable));
  if (status !== 0) throw new Error(`read of sector ${sector} ended with status ${status}`);
  if (Buffer.compare(data, pattern(sector, sectors)) !== 0) throw new Error(`sector ${sector} is not what was written`);
}

function pattern(sector: number, sectors: number): Uint8Array {
  const bytes = new Uint8Array(sectors * SECTOR);
  for (let at = 0; at < bytes.length; at++) bytes[at] = (sector * 7 + at * 13 + (at >> 8)) & 0xff;
  return bytes;
}

function program(
  directory: string,
  name: string,
  environment: Readonly<Record<string, string>>,
  words: readonly string[],
  log = name,
): Child {
  return new Child([process.execPath, join(BIN, `${name}.ts`), ...words], {
    name,
    log: join(directory, `${log}.log`),
    environment,
  });
}
