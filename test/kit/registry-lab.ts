import { mkdtemp, open, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { createLogger, type Logger, silentLogger } from "../../src/base/log.ts";
import type { Deadlines } from "../../src/daemon/deadlines.ts";
import { DeviceRegistry } from "../../src/daemon/registry.ts";
import { type PciAddress, parsePciAddress } from "../../src/pci/address.ts";
import { Bus } from "../../src/pci/bus.ts";
import type { QueueStats } from "../../src/pci/function.ts";
import type { AddressSpaces } from "../../src/pci/open.ts";
import { BUILT_IN_PLUGINS, PluginRegistry } from "../../src/plugin-host.ts";
import { RpcClient } from "../../src/rpc/client.ts";
import { controlSocket } from "../../src/softvf/config.ts";
import { vfAddress } from "../../src/softvf/topology.ts";
import { FrontendListener, VhostUserFrontend } from "./frontend/frontend.ts";
import { Child } from "./guest/child.ts";
import { MemoryKeeper } from "./memory-keeper.ts";
import type { Migration } from "./movers.ts";

/** Tests are read by their assertions; `VFE_TEST_LOG=1` shows what the daemon says. */
const log = process.env.VFE_TEST_LOG === undefined ? silentLogger : createLogger("debug", false);

const ROOT = join(import.meta.dir, "../..");
/** Milliseconds. */
const CONTROL_TIMEOUT = 10_000;
const START_TIMEOUT = 15_000;
const DISK_SIZE = 64 << 20;

export interface RegistryLabOptions {
  /** Whether the PF can move its VFs' state. "vendor" unless said. */
  readonly migration?: Migration;
  /** VFs of the PF; 4 unless said. */
  readonly vfs?: number;
  /** Device class of PF and VFs. Block devices that share one disk image unless said. */
  readonly className?: string;
  /** Absolute paths of plugins beside those that are built in, for both processes. */
  readonly plugins?: readonly string[];
  /** Further options of vfe-softvf. */
  readonly softvf?: readonly string[];
  /** Bytes of the disk image, where no class is named. */
  readonly diskSize?: number;
  /** Of the registry, where they are not the usual ones. */
  readonly deadlines?: Partial<Deadlines>;
  readonly spaces?: AddressSpaces;
}

/** vfe-softvf in a process of its own, and the daemon's device registry in this one. */
export class RegistryLab implements AsyncDisposable {
  readonly pf = parsePciAddress("0000:5a:00.0");
  readonly vf = this.vfAt(0);
  readonly vf2 = this.vfAt(1);
  readonly keeper = new MemoryKeeper();
  /** Warnings and errors of the registry, one line each. */
  readonly warnings: string[] = [];
  registry: DeviceRegistry;

  private constructor(
    readonly directory: string,
    readonly softvf: Child,
    private readonly plugins: PluginRegistry,
    private readonly ofRegistry: Pick<RegistryLabOptions, "deadlines" | "spaces">,
  ) {
    this.registry = this.newRegistry();
  }

  static async create(options: RegistryLabOptions = {}): Promise<RegistryLab> {
    const { migration = "vendor", vfs = 4, plugins = [], softvf = [] } = options;
    const directory = await mkdtemp(join(tmpdir(), "registry-"));
    await using undo = new AsyncDisposableStack();
    undo.defer(() => rm(directory, { recursive: true, force: true }));
    const ofClass = options.className === undefined ? await diskOptions(directory, options.diskSize) : [];
    const child = new Child(
      [
        ...[process.execPath, join(ROOT, "bin/vfe-softvf.ts"), "--pf", "0000:5a:00.0"],
        ...["--class", options.className ?? "blk", "--vfs", `${vfs}`, "--migration", migration, ...ofClass],
        ...["--runtime-dir", join(directory, "softvf"), ...plugins.flatMap((path) => ["--plugin", path]), ...softvf],
      ],
      { name: "vfe-softvf", log: join(directory, "softvf.log") },
    );
    undo.use(child);
    await child.line(/^ready /m, START_TIMEOUT);
    const registry = await PluginRegistry.load({ builtIn: BUILT_IN_PLUGINS, plugins }, silentLogger);
    undo.move();
    return new RegistryLab(directory, child, registry, options);
  }

  /** A registry with nothing in it, over the same bus and keeper: what a restarted daemon begins with. */
  newRegistry(keeper = this.keeper): DeviceRegistry {
    const bus = new Bus([join(this.directory, "softvf/devices")]);
    const { plugins, ofRegistry } = this;
    const { deadlines = {}, spaces } = ofRegistry;
    const own = spaces === undefined ? {} : { spaces };
    return new DeviceRegistry({ bus, plugins, keeper, deadlines, ...own, log: recording(log, "", this.warnings) });
  }

  /** @param index from 0 */
  vfAt(index: number): PciAddress {
    return vfAddress(this.pf, index);
  }

  socket(name: string): string {
    return join(this.directory, name);
  }

  /** Options of a VF or of the PF, as an operator of the software PF sets them. */
  async set(address: PciAddress, options: Readonly<Record<string, string | number | boolean>>): Promise<void> {
    await this.control("set", { address, options });
  }

  /** What the queues of a VF have done since it was made. */
  async stats(vf = this.vf): Promise<readonly QueueStats[]> {
    const answer = (await this.control("stats", {})) as { address: string; queues: QueueStats[] }[];
    return answer.find(({ address }) => address === vf)?.queues ?? [];
  }

  /** Adds a VF in client mode and takes its connection. The PF must be there. */
  async connect(vf = this.vf, name = "vhost.sock", uuid = ""): Promise<VhostUserFrontend> {
    using listener = new FrontendListener(this.socket(name));
    await this.registry.addVf({ address: vf, socket: this.socket(name), mode: "client", uuid });
    return await listener.accept();
  }

  /** Adds a VF in server mode, for `dial`. */
  async serve(vf = this.vf): Promise<void> {
    await this.registry.addVf({ address: vf, socket: this.socket(`${vf}.sock`), mode: "server" });
  }

  /** A connection to a VF that was added by `serve`. */
  dial(vf = this.vf): VhostUserFrontend {
    return VhostUserFrontend.connect(this.socket(`${vf}.sock`));
  }

  /** Waits until no session of this VF is left. */
  async idle(vf = this.vf): Promise<void> {
    await Deadline.after(CONTROL_TIMEOUT, `end of the session of ${vf}`).poll(() => {
      const { state, connected } = this.registry.vfInfo(vf);
      return (state === "idle" && !connected) || undefined;
    }, 1);
  }

  /** Waits until the device of this VF runs. */
  async running(vf = this.vf): Promise<void> {
    await Deadline.after(CONTROL_TIMEOUT, `start of ${vf}`).poll(
      () => this.registry.vfInfo(vf).state === "running" || undefined,
      1,
    );
  }

  /** Runs a front-end up to DRIVER_OK. */
  async run(frontend: VhostUserFrontend, queues = 1, firstIndex = 0): Promise<void> {
    await frontend.negotiate();
    await frontend.setupMemory([
      { gpa: 0, size: 8 << 20 },
      { gpa: 2 ** 32, size: 32 << 20 },
    ]);
    await frontend.startQueues(queues, { firstIndex });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.registry.close();
    this.keeper[Symbol.dispose]();
    await this.softvf[Symbol.asyncDispose]();
    await rm(this.directory, { recursive: true, force: true });
  }

  private async control(method: string, params: Readonly<Record<string, unknown>>): Promise<unknown> {
    const deadline = Deadline.after(CONTROL_TIMEOUT, method);
    using client = await RpcClient.connect(controlSocket(join(this.directory, "softvf")), deadline);
    return await client.call(method, params, deadline);
  }
}

/** Options for VFs that share one image. @param size bytes */
async function diskOptions(directory: string, size = DISK_SIZE): Promise<string[]> {
  const disk = join(directory, "disk.img");
  await using file = await open(disk, "w");
  await file.truncate(size);
  return ["--disk", disk];
}

/** Notes warnings and errors in `lines`, and passes everything on. */
function recording(log: Logger, subject: string, lines: string[]): Logger {
  const note = (message: string, cause: unknown) => {
    lines.push(`${subject}: ${message}${cause instanceof Error ? `: ${cause.message}` : ""}`);
  };
  return {
    error: (message, cause) => {
      note(message, cause);
      log.error(message, cause);
    },
    warn: (message, cause) => {
      note(message, cause);
      log.warn(message, cause);
    },
    info: (message) => log.info(message),
    debug: (message) => log.debug(message),
    child: (name) => recording(log.child(name), subject === "" ? name : `${subject} ${name}`, lines),
  };
}
