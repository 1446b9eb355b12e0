import { readFileSync } from "node:fs";
import { mkdtemp, open, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import type { Json } from "../../src/base/json.ts";
import { KeeperClient } from "../../src/keeper/keeper-client.ts";
import { type PciAddress, parsePciAddress } from "../../src/pci/address.ts";
import { RpcClient } from "../../src/rpc/client.ts";
import { keeperSocket, rpcSocket } from "../../src/runtime-directory.ts";
import { vfAddress } from "../../src/softvf/topology.ts";
import { FrontendListener, type VhostUserFrontend } from "./frontend/frontend.ts";
import { Child } from "./guest/child.ts";

const ROOT = join(import.meta.dir, "../..");
/** Milliseconds. */
const START_TIMEOUT = 20_000;
const CALL_TIMEOUT = 20_000;

export interface HaLabOptions {
  /** VFs of the PF; 4 unless said. */
  readonly vfs?: number;
  /** Of each VF; 1 unless said. */
  readonly queues?: number;
  /** Whether the PF can move its VFs' state. "vendor" unless said. */
  readonly migration?: "vendor" | "none";
  /** Further options of vfe-softvf. */
  readonly softvf?: readonly string[];
  /** Device class of PF and VFs. Block devices that share one disk image unless said. */
  readonly className?: string;
  /** Whether the keeper runs when it is made; it does unless said. */
  readonly keeper?: boolean;
}

export interface KeeperOptions {
  /** Open files that it may have. */
  readonly files?: number;
  /** User id; root unless said. */
  readonly user?: number;
}

/** A VF as "vf.list" shows it, in service or not. */
export interface ListedVf {
  readonly vf: string;
  readonly probed: boolean;
  readonly state: string;
  readonly reason: string | null;
  /** Of one in service. */
  readonly connected?: boolean;
}

/** What a keeper has under a key; the fds are borrowed. */
export interface Rewritten {
  readonly record: Readonly<Record<string, Json>>;
  readonly fds: Map<string, number>;
}

export interface DaemonOptions {
  /** It kills itself at this step, once it is armed. */
  readonly dieAt?: number;
  readonly arguments?: readonly string[];
  /** User id; root unless said. */
  readonly user?: number;
  /** Another program than the daemon of this tree. */
  readonly program?: readonly string[];
  /** As of Child. */
  readonly environment?: Readonly<Record<string, string>>;
  /** As of Child. */
  readonly fds?: readonly number[];
}

/** vfe-softvf, the keeper and the daemon, each a process of its own that can be killed. */
export class HaLab implements AsyncDisposable {
  readonly pf = parsePciAddress("0000:5a:00.0");
  private current: Child | undefined;
  private daemons = 0;
  private currentKeeper: Child | undefined;
  private keepers = 0;

  private constructor(
    readonly directory: string,
    private currentSoftvf: Child,
    private readonly softvfCommand: readonly string[],
  ) {}

  static async create(options: HaLabOptions = {}): Promise<HaLab> {
    const { vfs = 4, queues = 1, migration = "vendor", softvf = [], className = "blk", keeper = true } = options;
    const directory = await mkdtemp(join(tmpdir(), "ha-"));
    await using undo = new AsyncDisposableStack();
    undo.defer(() => rm(directory, { recursive: true, force: true }));
    const image = join(directory, "disk.img");
    await using file = await open(image, "w");
    await file.truncate(64 << 20);
    const command = [
      ...[process.execPath, join(ROOT, "bin/vfe-softvf.ts"), "--pf", "0000:5a:00.0", "--class", className],
      ...["--vfs", `${vfs}`, "--queues", `${queues}`, "--migration", migration],
      ...(className === "blk" ? ["--disk", image] : []),
      ...["--runtime-dir", join(directory, "softvf"), ...softvf],
    ];
    const child = undo.use(await startSoftvf(command, join(directory, "softvf.log")));
    const lab = new HaLab(directory, child, command);
    undo.use(lab);
    if (keeper) await lab.startKeeper();
    undo.move();
    return lab;
  }

  get softvf(): Child {
    return this.currentSoftvf;
  }

  /** SIGKILL, and another one in its place: all functions are fresh ones. */
  async replaceSoftvf(): Promise<void> {
    await this.softvf.kill();
    const log = join(this.directory, `softvf.${Date.now()}.log`);
    this.currentSoftvf = await startSoftvf(this.softvfCommand, log);
  }

  get runtimeDirectory(): string {
    return join(this.directory, "daemon");
  }

  get daemon(): Child {
    if (this.current === undefined) throw new Error("no daemon was started");
    return this.current;
  }

  get keeper(): Child {
    if (this.currentKeeper === undefined) throw new Error("no keeper was started");
    return this.currentKeeper;
  }

  /** @param index from 0 */
  vfAt(index: number): PciAddress {
    return vfAddress(this.pf, index);
  }

  socket(name: string): string {
    return join(this.directory, name);
  }

  async startKeeper({ files, user }: KeeperOptions = {}): Promise<void> {
    const limit = files === undefined ? [] : ["bash", "-c", `ulimit -n ${files}; exec "$@"`, "limited"];
    this.currentKeeper = new Child(
      [
        ...asUser(user),
        ...limit,
        process.execPath,
        join(ROOT, "bin/vhostd-ha.ts"),
        "--runtime-dir",
        this.runtimeDirectory,
      ],
      { name: "vfe-vhostd-ha", log: join(this.directory, `keeper.${this.keepers++}.log`) },
    );
    await this.currentKeeper.line(/^ready /m, START_TIMEOUT);
  }

  /** As the daemon; nobody else is served meanwhile. @param timeout milliseconds */
  connectKeeper(timeout = CALL_TIMEOUT): Promise<KeeperClient> {
    const deadline = Deadline.after(timeout, "being served by the keeper");
    return KeeperClient.connect(keeperSocket(this.runtimeDirectory), deadline);
  }

  /** Waits until the keeper has all that the daemon has. */
  async isProtected(): Promise<void> {
    await Deadline.after(CALL_TIMEOUT, "a keeper that has all").poll(async () => {
      const stats = await this.call<{ protected: boolean }>("stats");
      return stats.protected || undefined;
    }, 20);
  }

  /** Returns at once; `ready` waits. */
  spawnDaemon({ dieAt, arguments: more = [], user, program, environment = {}, fds = [] }: DaemonOptions = {}): Child {
    const entry = join(ROOT, dieAt === undefined ? "bin/vhostd.ts" : "test/kit/dying-daemon.ts");
    this.current = new Child(
      [
        ...asUser(user),
        ...(program ?? [process.execPath, entry]),
        ...["--runtime-dir", this.runtimeDirectory, "--bus", join(this.directory, "softvf/devices")],
        ...[
          "--state-dir",
          join(this.directory, "state"),
          "--log-level",
          process.env["VFE_TEST_LOG"] ?? "info",
          ...more,
        ],
      ],
      {
        name: "vfe-vhostd",
        log: join(this.directory, `daemon.${this.daemons++}.log`),
        environment: { ...environment, ...(dieAt === undefined ? {} : { VFE_DIE_AT: `${dieAt}` }) },
        fds,
      },
    );
    return this.current;
  }

  /** What the last two daemons have written, for a test that fails. */
  get story(): string {
    return [this.daemons - 2, this.daemons - 1]
      .filter((number) => number >= 0)
      .map((number) => readFileSync(join(this.directory, `daemon.${number}.log`), "utf8"))
      .join("---- the next one\n");
  }

  /** Waits until the control interface is served. */
  async ready(): Promise<void> {
    await this.daemon.line(/^ready /m, START_TIMEOUT);
  }

  async startDaemon(options: DaemonOptions = {}): Promise<void> {
    this.spawnDaemon(options);
    await this.ready();
  }

  /** SIGKILL, and another one at once. */
  async replaceDaemon(options: DaemonOptions = {}): Promise<void> {
    await this.daemon.kill();
    this.spawnDaemon(options);
  }

  /** Calls the control interface. */
  async call<T = unknown>(method: string, params: Readonly<Record<string, unknown>> = {}): Promise<T> {
    const deadline = Deadline.after(CALL_TIMEOUT, method);
    using client = await RpcClient.connect(rpcSocket(this.runtimeDirectory), deadline);
    return (await client.call(method, params, deadline)) as T;
  }

  /** Waits until no VF waits to be taken up. */
  async takenUp(): Promise<void> {
    await this.ready();
    await Deadline.after(CALL_TIMEOUT, "taking up all VFs").poll(async () => {
      const { left } = await this.call<{ left: { state: string }[] }>("vf.list");
      return left.every(({ state }) => state !== "adopting") || undefined;
    }, 5);
  }

  /**
   * The daemon is killed, the next one takes up what is there after `meanwhile`, which has the keeper for itself.
   */
  async dieAndRevive(meanwhile: (keeper: KeeperClient) => Promise<void>, options: DaemonOptions = {}): Promise<void> {
    await this.daemon.kill();
    {
      using keeper = await this.connectKeeper();
      await meanwhile(keeper);
    }
    this.spawnDaemon(options);
    await this.takenUp();
  }

  /** @param index from 0 @throws Error where it is not listed */
  async vf(index = 0): Promise<ListedVf> {
    const { vfs, left } = await this.call<{ vfs: ListedVf[]; left: ListedVf[] }>("vf.list");
    const found = [...vfs, ...left].find(({ vf }) => vf === this.vfAt(index));
    if (found === undefined) throw new Error(`VF ${this.vfAt(index)} is not listed`);
    return found;
  }

  /** Waits until a VF is in that state. @throws VhostdError timedOut, with what it is at last */
  async vfIs(state: string, index = 0): Promise<ListedVf> {
    let last: ListedVf | undefined;
    const deadline = Deadline.after(CALL_TIMEOUT, `VF ${index} to be ${state}`);
    try {
      return await deadline.poll(async () => {
        last = await this.vf(index);
        return last.state === state ? last : undefined;
      }, 10);
    } catch (cause) {
      throw new Error(`${JSON.stringify(last)}\n${this.story}`, { cause });
    }
  }

  async addPf(): Promise<void> {
    await this.call("pf.add", { device: this.pf });
  }

  /** Adds a VF in client mode, and takes its connection. The PF must be there. */
  async connect(index = 0, more: Readonly<Record<string, unknown>> = {}): Promise<ConnectedFrontend> {
    const listener = new FrontendListener(this.vfSocket(index));
    await this.addVf(index, more);
    return { listener, frontend: await listener.accept() };
  }

  /** Adds a VF in client mode; somebody may listen at its socket. */
  async addVf(index = 0, more: Readonly<Record<string, unknown>> = {}): Promise<void> {
    await this.call("vf.add", { device: this.vfAt(index), socket: this.vfSocket(index), ...more });
  }

  async removeVf(index = 0): Promise<void> {
    await this.call("vf.remove", { device: this.vfAt(index) });
  }

  private vfSocket(index: number): string {
    return this.socket(`vf${index}.sock`);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // The keeper first: without it the daemon lets go of everything.
    await this.currentKeeper?.kill();
    await this.current?.[Symbol.asyncDispose]();
    await this.softvf[Symbol.asyncDispose]();
    await rm(this.directory, { recursive: true, force: true });
  }
}

/** A front-end that listens for the daemon, and goes on listening. */
export interface ConnectedFrontend {
  readonly listener: FrontendListener;
  readonly frontend: VhostUserFrontend;
}

/** Puts another record, or other fds, in the place of what the keeper has. @throws Error where it has nothing */
export async function rewrite(
  keeper: KeeperClient,
  key: string,
  change: (stored: Rewritten) => { readonly record: Json; readonly fds: ReadonlyMap<string, number> },
): Promise<void> {
  const stored = await keeper.get(key);
  if (stored === undefined) throw new Error(`the keeper has no ${key}, but ${await keeper.list()}`);
  using fds = new DisposableStack();
  for (const fd of stored.fds.values()) fds.use(fd);
  const borrowed = new Map([...stored.fds].map(([name, fd]) => [name, fd.number] as const));
  const kept = change({ record: stored.record as Rewritten["record"], fds: borrowed });
  await keeper.put(key, () => kept);
}

/** It gets to the files of others all the same. */
function asUser(user: number | undefined): readonly string[] {
  if (user === undefined) return [];
  return ["setpriv", `--reuid=${user}`, "--inh-caps=+dac_override", "--ambient-caps=+dac_override"];
}

async function startSoftvf(command: readonly string[], log: string): Promise<Child> {
  await using undo = new AsyncDisposableStack();
  const child = undo.use(new Child(command, { name: "vfe-softvf", log }));
  await child.line(/^ready /m, START_TIMEOUT);
  undo.move();
  return child;
}

/** Open file descriptors of a process. */
export async function countFds(pid: number): Promise<number> {
  return (await Array.fromAsync(new Bun.Glob("*").scan({ cwd: `/proc/${pid}/fd`, onlyFiles: false, dot: true })))
    .length;
}
