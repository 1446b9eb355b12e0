import { mkdir, mkdtemp, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Deadline } from "../../../src/base/deadline.ts";
import { VhostdError } from "../../../src/base/errors.ts";
import { silentLogger } from "../../../src/base/log.ts";
import type { Deadlines } from "../../../src/daemon/deadlines.ts";
import { DeviceRegistry, type RegistryEvent } from "../../../src/daemon/registry.ts";
import { memfd } from "../../../src/native/sys.ts";
import { type PciAddress, parsePciAddress } from "../../../src/pci/address.ts";
import type { AddressSpace } from "../../../src/pci/address-space.ts";
import { Bus, type BusEntry } from "../../../src/pci/bus.ts";
import { PluginRegistry } from "../../../src/plugin-host.ts";
import { PciCommand, PciConfig } from "../../../src/virtio/registers.ts";
import { fakeClass } from "../../kit/fake-class.ts";
import { FakeDma } from "../../kit/fake-dma.ts";
import { FakeFunction } from "../../kit/fake-function.ts";
import { VhostUserFrontend } from "../../kit/frontend/frontend.ts";
import { MemoryKeeper } from "../../kit/memory-keeper.ts";

export const PF = parsePciAddress("0000:5a:00.0");
export const VF = parsePciAddress("0000:5a:00.1");
/** A function that is no VF. */
export const PLAIN = parsePciAddress("0000:03:00.0");

/** A function whose doorbells may be mapped. Notes what is done to it in `steps`. */
class KernelFunction extends FakeFunction {
  constructor(
    private readonly name: PciAddress,
    private readonly steps: string[],
    private readonly closing: Promise<void>,
    shares: number,
  ) {
    super({ queues: 2, multiplier: 4096, shares });
  }

  get isMaster(): boolean {
    return (this.configBytes[PciConfig.command]! & PciCommand.busMaster) !== 0;
  }

  override async reset(): Promise<void> {
    this.steps.push(`reset ${this.name}`);
    await super.reset();
  }

  override async [Symbol.asyncDispose](): Promise<void> {
    this.steps.push(`close ${this.name}`);
    await this.closing;
  }
}

/** A bus directory as sysfs has it, an address space of JavaScript instead of the kernel's, and the registry over both. */
export class KernelBus implements AsyncDisposable {
  /** What was done to functions and memory, in order; behind an attach or unmap whether a function masters the bus. */
  readonly steps: string[] = [];
  readonly events: RegistryEvent[] = [];
  readonly keeper = new MemoryKeeper();
  /** The function that was opened last, by address. */
  readonly functions = new Map<PciAddress, KernelFunction>();
  readonly registry: DeviceRegistry;
  /** What functions that are opened now wait for when they are closed. */
  slowClose: Promise<void> = Promise.resolve();
  /** Why no memory can be mapped now. */
  refuseMemory: Error | undefined;
  /** What the kernel says of a function that somebody else has open. */
  heldBy: string | undefined;
  private readonly doorbells = memfd("doorbells", 0x10000);

  private constructor(
    readonly directory: string,
    plugins: PluginRegistry,
    deadlines: Partial<Deadlines>,
  ) {
    const { keeper } = this;
    this.registry = new DeviceRegistry({
      ...{ bus: new Bus([join(directory, "bus")]), plugins, keeper, deadlines, log: silentLogger },
      spaces: () => this.space(),
      stillHeld: async () => this.heldBy,
    });
    this.registry.onEvent((event) => this.events.push(event));
  }

  static async create(deadlines: Partial<Deadlines> = {}): Promise<KernelBus> {
    const directory = await mkdtemp(join(tmpdir(), "kernel-bus-"));
    const functions: [PciAddress, Record<string, string>][] = [
      [PF, { virtfn0: `../${VF}` }],
      [VF, { physfn: `../${PF}` }],
      [PLAIN, {}],
    ];
    for (const [address, links] of functions) {
      const path = join(directory, "bus", address);
      await mkdir(path, { recursive: true });
      const attributes = { vendor: "0x1af4", device: "0x1042", class: "0x018000", numa_node: "1" };
      for (const [name, text] of Object.entries(attributes)) await writeFile(join(path, name), `${text}\n`);
      const all = { ...links, driver: "../../drivers/vfio-pci", iommu_group: "../../iommu_groups/7" };
      for (const [name, target] of Object.entries(all)) await symlink(target, join(path, name));
    }
    const plugins = await PluginRegistry.load({ plugins: [] }, silentLogger);
    const deviceClass = fakeClass({ name: "blk" });
    plugins.register(
      { name: "fake", apiVersion: 1, setup: (host: PluginHost) => host.deviceClass(deviceClass) },
      "test",
    );
    return new KernelBus(directory, plugins, deadlines);
  }

  fn(address: PciAddress): KernelFunction {
    return this.functions.get(address)!;
  }

  socket(address: PciAddress): string {
    return join(this.directory, `${address}.sock`);
  }

  add(address: PciAddress, more: { unmanaged?: boolean; hostNotifier?: boolean } = { unmanaged: true }) {
    return this.registry.addVf({ address, socket: this.socket(address), mode: "server", ...more });
  }

  /** A guest whose driver runs the function. */
  async guest(address: PciAddress): Promise<VhostUserFrontend> {
    const frontend = VhostUserFrontend.connect(this.socket(address));
    await frontend.negotiate();
    await frontend.setupMemory([{ gpa: 0, size: 8 << 20 }]);
    await frontend.startQueues(2);
    await this.until(() => this.registry.vfInfo(address).state === "running");
    return frontend;
  }

  async until(condition: () => boolean): Promise<void> {
    await Deadline.after(5000, "the test").poll(() => condition() || undefined, 1);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.registry.close();
    this.keeper[Symbol.dispose]();
    this.doorbells[Symbol.dispose]();
    await rm(this.directory, { recursive: true, force: true });
  }

  private space(): AddressSpace {
    const dma = new FakeDma();
    const { steps } = this;
    const masters = () => ([...this.functions.values()].some((fn) => fn.isMaster) ? "master" : "cut off");
    return {
      ioRanges: dma.ioRanges,
      pageSize: dma.pageSize,
      interface: "group",
      open: async ({ address }: BusEntry) => {
        if (this.heldBy !== undefined) throw new VhostdError("busy", this.heldBy);
        const fn = new KernelFunction(address, steps, this.slowClose, this.doorbells.number);
        this.functions.set(address, fn);
        steps.push(`open ${address}`);
        return fn;
      },
      revive: () => dma.revive(),
      attach: async () => void steps.push(`attach ${masters()}`),
      detach: async (fn) => {
        steps.push("detach");
        await fn.config.write(PciConfig.command, 2, PciCommand.memory);
      },
      map: async (range, fd) => {
        steps.push("map");
        if (this.refuseMemory !== undefined) throw this.refuseMemory;
        await dma.map(range, fd);
      },
      unmap: async (range) => {
        steps.push(`unmap ${masters()}`);
        await dma.unmap(range);
      },
      unmapIfThere: (range) => dma.unmapIfThere(range),
      adopt: () => {},
      [Symbol.dispose]: () => {
        steps.push("end of the space");
        dma[Symbol.dispose]();
      },
    };
  }
}

interface PluginHost {
  deviceClass(deviceClass: ReturnType<typeof fakeClass>): void;
}
