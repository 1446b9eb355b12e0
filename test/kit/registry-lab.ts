import { mkdtemp, open, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createLogger, silentLogger } from "../../src/base/log.ts";
import { DeviceRegistry } from "../../src/daemon/registry.ts";
import { parsePciAddress } from "../../src/pci/address.ts";
import { Bus } from "../../src/pci/bus.ts";
import { BUILT_IN_PLUGINS, PluginRegistry } from "../../src/plugin-host.ts";
import { FrontendListener, type VhostUserFrontend } from "./frontend/frontend.ts";
import { Child } from "./guest/child.ts";
import { MemoryKeeper } from "./memory-keeper.ts";

/** Tests are read by their assertions; `VFE_TEST_LOG=1` shows what the daemon says. */
const log = process.env.VFE_TEST_LOG === undefined ? silentLogger : createLogger("debug", false);

const ROOT = join(import.meta.dir, "../..");

export interface RegistryLabOptions {
  /** Options of vfe-softvf beside PF, class, disk and runtime directory. */
  readonly softvf?: readonly string[];
  /** Bytes of the disk image. */
  readonly diskSize?: number;
}

/** vfe-softvf in a process of its own, and the daemon's device registry in this one. */
export class RegistryLab implements AsyncDisposable {
  readonly pf = parsePciAddress("0000:5a:00.0");
  readonly vf = parsePciAddress("0000:5a:00.1");
  readonly vf2 = parsePciAddress("0000:5a:00.2");
  readonly keeper = new MemoryKeeper();
  registry: DeviceRegistry;

  private constructor(
    readonly directory: string,
    readonly softvf: Child,
    private readonly plugins: PluginRegistry,
  ) {
    this.registry = this.newRegistry();
  }

  static async create({ softvf = [], diskSize = 64 << 20 }: RegistryLabOptions = {}): Promise<RegistryLab> {
    const directory = await mkdtemp(join(tmpdir(), "registry-"));
    const disk = join(directory, "disk.img");
    await using file = await open(disk, "w");
    await file.truncate(diskSize);
    const process_ = new Child(
      [
        ...[process.execPath, join(ROOT, "bin/vfe-softvf.ts"), "--pf", "0000:5a:00.0", "--class", "blk", "--vfs", "4"],
        ...["--disk", disk, "--runtime-dir", join(directory, "softvf"), ...softvf],
      ],
      { name: "vfe-softvf", log: join(directory, "softvf.log") },
    );
    await process_.line(/^ready /m, 15_000);
    const plugins = await PluginRegistry.load({ builtIn: BUILT_IN_PLUGINS, plugins: [] }, silentLogger);
    return new RegistryLab(directory, process_, plugins);
  }

  /** A registry with nothing in it, over the same bus and keeper: what a restarted daemon begins with. */
  newRegistry(): DeviceRegistry {
    const bus = new Bus([join(this.directory, "softvf/devices")]);
    return new DeviceRegistry({ bus, plugins: this.plugins, keeper: this.keeper, log });
  }

  socket(name: string): string {
    return join(this.directory, name);
  }

  /** Adds a VF in client mode and takes its connection. The PF must be there. */
  async connect(vf = this.vf, name = "vhost.sock", uuid = ""): Promise<VhostUserFrontend> {
    using listener = new FrontendListener(this.socket(name));
    await this.registry.addVf({ address: vf, socket: this.socket(name), mode: "client", uuid });
    return await listener.accept();
  }

  /** Runs a front-end up to DRIVER_OK. */
  async run(frontend: VhostUserFrontend, queues = 1): Promise<void> {
    await frontend.negotiate();
    await frontend.setupMemory([
      { gpa: 0, size: 8 << 20 },
      { gpa: 2 ** 32, size: 32 << 20 },
    ]);
    await frontend.startQueues(queues);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.registry.close();
    this.keeper[Symbol.dispose]();
    await this.softvf[Symbol.asyncDispose]();
    await rm(this.directory, { recursive: true, force: true });
  }
}
