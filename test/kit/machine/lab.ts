import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Deadline } from "../../../src/base/deadline.ts";
import { RpcClient } from "../../../src/rpc/client.ts";
import { rpcSocket } from "../../../src/runtime-directory.ts";
import { VhostUserFrontend } from "../frontend/frontend.ts";
import { Child } from "../guest/child.ts";
import { NetFrontend, type NetFrontendOptions } from "../net/net-frontend.ts";
import { Machine } from "./inside.ts";
import type { DmaFault, KernelLog } from "./kernel-log.ts";
import type { PciAddress } from "./pci-function.ts";
import { PROGRAM_ENVIRONMENT, programLine } from "./programs.ts";

/** Milliseconds for a test, on a machine that is emulated by one that may be busy. */
export const MACHINE_TEST_TIMEOUT = 180_000;
/** Milliseconds. */
const START_TIMEOUT = 120_000;
const CALL_TIMEOUT = 120_000;
const STATE_TIMEOUT = 60_000;
/** Open files of a keeper: the machine's own limit is one for small programs. */
const KEEPER_FILES = 1 << 16;

export interface MachineLabOptions {
  /** Options of vhostd beside its directories. */
  readonly daemon?: readonly string[];
  /** A keeper runs from the start, so that each daemon goes on with what the one before it had. */
  readonly keeper?: boolean;
}

export interface CliResult {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** Of a VF that is added by `add`. */
export interface AddOptions {
  /** UUID of its VM. */
  readonly vm?: string;
  /** No host notifier is given to its front-end. */
  readonly hostNotifier?: boolean;
  /** Its PF must be there. Functions are taken as they are unless said. */
  readonly ofPf?: boolean;
}

/** What vf.info answers, as far as tests look at it. */
export interface LabVfInfo {
  readonly state: string;
  readonly reason: string | null;
  readonly connected: boolean;
  readonly pf: string | null;
  readonly [member: string]: unknown;
}

/**
 * For tests in the machine: the daemon as a process on the machine's own functions, its command line, and front-ends of
 * our own at its sockets. When it is disposed of, functions are nobody's again; a DMA fault that no test has taken is an
 * error then.
 */
export class MachineLab implements AsyncDisposable {
  readonly machine = Machine.here();
  /** What the kernel says from the start of the lab on. */
  readonly kernelLog: KernelLog;
  private running: Child | undefined;
  private daemons = 0;
  private runningKeeper: Child | undefined;
  private keepers = 0;
  private faultsTaken = 0;
  private readonly bound = new Map<string, Disposable>();
  private readonly undo = new AsyncDisposableStack();

  private constructor(
    /** Temporary; for sockets and files of the test, too. */
    readonly directory: string,
    private readonly options: MachineLabOptions,
  ) {
    this.kernelLog = this.machine.kernelLog();
    // Undone from the last to the first.
    this.undo.use(this.kernelLog);
    this.undo.defer(() => this.checkFaults());
    this.undo.defer(() => rm(directory, { recursive: true, force: true }));
    this.undo.defer(() => this.showLogs());
    this.undo.defer(() => this.release());
    this.undo.defer(() => this.running?.[Symbol.asyncDispose]());
    // Without it the daemon lets go of everything.
    this.undo.defer(() => this.runningKeeper?.kill());
  }

  /** The daemon runs and has no functions. */
  static async create(options: MachineLabOptions = {}): Promise<MachineLab> {
    const lab = new MachineLab(await mkdtemp(join(tmpdir(), "lab-")), options);
    try {
      if (options.keeper) await lab.startKeeper();
      await lab.startDaemon();
    } catch (error) {
      await lab[Symbol.asyncDispose]();
      throw error;
    }
    return lab;
  }

  get daemon(): Child {
    if (this.running === undefined) throw new Error("there is no daemon");
    return this.running;
  }

  get keeper(): Child {
    if (this.runningKeeper === undefined) throw new Error("there is no keeper");
    return this.runningKeeper;
  }

  async startKeeper(): Promise<void> {
    const log = join(this.directory, `keeper${this.keepers++}.log`);
    const limited = ["prlimit", `--nofile=${KEEPER_FILES}:${KEEPER_FILES}`, ...programLine("vfe-vhostd-ha")];
    const line = [...limited, "--runtime-dir", this.runtimeDirectory];
    this.runningKeeper = new Child(line, { name: "vfe-vhostd-ha", log, environment: PROGRAM_ENVIRONMENT });
    await this.runningKeeper.line(/^ready /m, START_TIMEOUT);
  }

  /** Starts the daemon in the same directories as before. @param more options beside those of the lab */
  async startDaemon(...more: readonly string[]): Promise<void> {
    this.spawnDaemon(...more);
    await this.ready();
  }

  /** The same, and returns at once. */
  spawnDaemon(...more: readonly string[]): void {
    const own = ["--bus", "/sys/bus/pci/devices", "--runtime-dir", this.runtimeDirectory, "--log-level", "debug"];
    const state = ["--state-dir", join(this.directory, "state")];
    const line = [...programLine("vfe-vhostd"), ...own, ...state, ...(this.options.daemon ?? []), ...more];
    const log = this.daemonLog(this.daemons++);
    this.running = new Child(line, { name: "vfe-vhostd", log, environment: PROGRAM_ENVIRONMENT });
  }

  /** Waits until the control interface is served. */
  async ready(): Promise<void> {
    await this.daemon.line(/^ready /m, START_TIMEOUT);
  }

  /** Waits until no VF of an earlier daemon waits to be taken up. @throws VhostdError timedOut */
  async takenUp(): Promise<void> {
    await this.ready();
    await Deadline.after(STATE_TIMEOUT, "taking up all VFs").poll(async () => {
      const { left } = (await this.call("vf.list")) as { readonly left: readonly { readonly state: string }[] };
      return left.every(({ state }) => state !== "adopting") || undefined;
    }, 20);
  }

  /** kill -9, and another one at once. */
  async replaceDaemon(): Promise<void> {
    await this.killDaemon();
    this.spawnDaemon();
  }

  /** kill -9. */
  async killDaemon(): Promise<void> {
    await this.daemon.kill();
    this.running = undefined;
  }

  /** As an operator does, by SIGTERM. */
  async stopDaemon(): Promise<void> {
    await this.daemon[Symbol.asyncDispose]();
    this.running = undefined;
  }

  /** Of the daemon's control interface. */
  get rpcSocket(): string {
    return rpcSocket(this.runtimeDirectory);
  }

  /** A method of the control interface. @throws VhostdError as the daemon gave it */
  async call(method: string, parameters: Readonly<Record<string, unknown>> = {}): Promise<unknown> {
    const deadline = Deadline.after(CALL_TIMEOUT, `${method} of the daemon`);
    using client = await RpcClient.connect(this.rpcSocket, deadline);
    return await client.call(method, parameters, deadline);
  }

  /** Runs vfe-vhost-cli. Each run starts a process: half a second or so. */
  async cli(...words: readonly string[]): Promise<CliResult> {
    const child = Bun.spawn([...programLine("vfe-vhost-cli"), ...words], {
      env: { ...process.env, VFE_VHOSTD_RUNTIME_DIR: this.runtimeDirectory },
      cwd: this.directory,
      stdio: ["ignore", "pipe", "pipe"],
    });
    const [stdout, stderr, code] = await Promise.all([child.stdout.text(), child.stderr.text(), child.exited]);
    return { code, stdout, stderr };
  }

  /**
   * Functions by QEMU's names, "blk0", bound to vfio-pci until the lab is disposed of.
   * @returns their PCI addresses
   */
  bind<const T extends readonly string[]>(...ids: T): { [K in keyof T]: string } {
    return ids.map((id) => this.bindFunction(this.machine.function(id))) as { [K in keyof T]: string };
  }

  /** @returns its PCI address */
  bindFunction(fn: PciAddress): string {
    if (!this.bound.has(fn.address)) this.bound.set(fn.address, fn.bind());
    return fn.address;
  }

  /**
   * Binds an SR-IOV function and makes VFs of it, which are bound to vfio-pci, too. All is undone with the lab.
   * @returns their PCI addresses
   */
  async makeVfs(id: string, count: number): Promise<string[]> {
    const pf = this.machine.function(id);
    this.bindFunction(pf);
    await writeFile("/sys/module/vfio_pci/parameters/enable_sriov", "Y");
    this.bound.set(`VFs of ${id}`, await this.machine.enableVfs(pf, count));
    return pf.vfs.map((vf) => this.bindFunction(vf));
  }

  /** Adds a function as a VF at whose socket the daemon listens. */
  async add(address: string, { vm, hostNotifier, ofPf = false }: AddOptions = {}): Promise<void> {
    await this.call("vf.add", {
      device: address,
      socket: this.socket(address),
      mode: "server",
      ...(vm === undefined ? {} : { uuid: vm }),
      ...(hostNotifier === undefined ? {} : { host_notifier: hostNotifier }),
      ...(ofPf ? {} : { unmanaged: true }),
    });
  }

  async remove(address: string): Promise<void> {
    await this.call("vf.remove", { device: address });
  }

  /** Every VF that the daemon has. */
  async removeAll(): Promise<void> {
    const { vfs } = (await this.call("vf.list")) as { readonly vfs: readonly { readonly vf: string }[] };
    for (const { vf } of vfs) await this.remove(vf);
  }

  /** vhost-user socket of a VF. */
  socket(address: string): string {
    return join(this.directory, `${address}.sock`);
  }

  /** A connection to a VF that was added by `add`. */
  dial(address: string): VhostUserFrontend {
    return VhostUserFrontend.connect(this.socket(address));
  }

  /** The same to a network function. */
  dialNet(address: string, options: NetFrontendOptions = {}): NetFrontend {
    return NetFrontend.connect(this.socket(address), options);
  }

  async info(address: string): Promise<LabVfInfo> {
    return (await this.call("vf.info", { device: address })) as LabVfInfo;
  }

  /** Waits until a VF is in a state. "idle": its session is gone, too. @throws VhostdError timedOut */
  async reaches(address: string, state: "idle" | "running" | "failed"): Promise<LabVfInfo> {
    return await Deadline.after(STATE_TIMEOUT, `${address}: ${state}`).poll(async () => {
      const info = await this.info(address);
      return info.state === state && (state !== "idle" || !info.connected) ? info : undefined;
    }, 50);
  }

  /** Waits until a DMA fault would be logged, which is not said of each where there are many. @throws VhostdError timedOut */
  async roomForFault(): Promise<void> {
    await this.kernelLog.roomForFault(Deadline.after(STATE_TIMEOUT, "the kernel to log DMA faults again"));
  }

  /** DMA faults that the kernel has logged since this was asked last. Who asks has expected them. */
  takeFaults(): DmaFault[] {
    const faults = this.kernelLog.dmaFaults().slice(this.faultsTaken);
    this.faultsTaken += faults.length;
    return faults;
  }

  /** Waits for a DMA fault. @returns all that there are; they count as taken. @throws VhostdError timedOut */
  async fault(): Promise<DmaFault[]> {
    return await Deadline.after(STATE_TIMEOUT, "a DMA fault").poll(() => {
      const faults = this.takeFaults();
      return faults.length > 0 ? faults : undefined;
    }, 20);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.undo.disposeAsync();
  }

  private get runtimeDirectory(): string {
    return join(this.directory, "run");
  }

  private release(): void {
    for (const binding of [...this.bound.values()].reverse()) binding[Symbol.dispose]();
  }

  /** `VFE_TEST_LOG=1` shows what the daemons have said. */
  private async showLogs(): Promise<void> {
    if (process.env["VFE_TEST_LOG"] === undefined) return;
    for (let index = 0; index < this.daemons; index++) console.log(await Bun.file(this.daemonLog(index)).text());
  }

  private checkFaults(): void {
    const faults = this.takeFaults();
    if (faults.length === 0) return;
    const told = faults.map(({ address, operation, iova }) => `${operation} of ${address} at 0x${iova.toString(16)}`);
    throw new Error(`DMA faults that nobody expected: ${told.slice(0, 5).join(", ")}`);
  }

  private daemonLog(index: number): string {
    return join(this.directory, `vhostd${index}.log`);
  }
}
