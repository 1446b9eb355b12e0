import { VhostdError } from "../../src/base/errors.ts";
import { fieldSize } from "../../src/base/layout.ts";
import { signalEventfd } from "../../src/native/sys.ts";
import { parsePciAddress } from "../../src/pci/address.ts";
import type { AccessWidth, Doorbell, PciFunction, RegisterSpace } from "../../src/pci/function.ts";
import { FeatureBit, featureBits, Status } from "../../src/virtio/features.ts";
import {
  COMMON_CONFIG,
  type CommonRegister,
  NO_VECTOR,
  PciCapability,
  PciConfig,
  VIRTIO_DEVICE_BASE,
  VIRTIO_NOTIFY_CAP,
  VIRTIO_VENDOR,
  VirtioCapType,
} from "../../src/virtio/registers.ts";

export interface FakeFunctionOptions {
  /** Virtio device id; 2, a block device. */
  readonly virtioId?: number;
  /** Beside VERSION_1. */
  readonly features?: bigint;
  readonly queues?: number;
  /** Largest ring, entries. */
  readonly queueSize?: number;
  /** MSI-X vectors; one for each queue and one more. */
  readonly vectors?: number;
  /** Device configuration space. */
  readonly config?: Uint8Array;
  /** Bytes from one queue's doorbell to the next; 4. */
  readonly multiplier?: number;
  /** The pages of doorbells can be given away: by this fd, at the offset in the notification area. */
  readonly shares?: number;
}

/** Ways in which the device misbehaves. All may be changed while it is in use. */
export interface Faults {
  resetNeverEnds: boolean;
  /** Feature bits that it offers and then does not accept. */
  refusedFeatures: bigint;
  /** Vectors from this number on are answered with NO_VECTOR. */
  vectorLimit: number;
  /** The generation counts on with every read. */
  generationSpins: boolean;
  queueEnableIgnored: boolean;
  /** Nobody answers: the status reads all ones. */
  silent: boolean;
}

interface FakeQueue {
  size: number;
  vector: number;
  enable: number;
  desc: bigint;
  driver: bigint;
  device: bigint;
}

/** Where things are in BAR 4. */
const BAR = 4;
const PLACES = { common: 0x0, isr: 0x1000, device: 0x2000, notify: 0x3000 } as const;
const PAGE_SIZE = 4096;
/** Where the capabilities are in configuration space. */
export const FAKE_CAPS = { msix: 0x40, common: 0x50, notify: 0x60, isr: 0x74, device: 0x84 } as const;

/**
 * A virtio PCI device made of registers alone, without a transport and without memory: for tests of everything that
 * programs a device. `faults` makes it misbehave; `configBytes` may be bent before it is probed.
 */
export class FakeFunction implements PciFunction {
  readonly address = parsePciAddress("0000:5a:00.1");
  readonly faults: Faults = {
    resetNeverEnds: false,
    refusedFeatures: 0n,
    vectorLimit: NO_VECTOR,
    generationSpins: false,
    queueEnableIgnored: false,
    silent: false,
  };
  /** Doorbell of each queue, in units of the multiplier. */
  readonly notifyOff: number[];
  /** PCI configuration space. */
  readonly configBytes: Uint8Array;
  /** Device configuration space. */
  readonly deviceConfig: Uint8Array;
  /** Doorbells rung, by `ring`, in order. */
  readonly rung: number[] = [];
  /** It waits on kicks itself. Set before its doorbells are asked for. */
  takesKicks = false;
  /** Queues whose doorbell a kick is connected to. */
  readonly connected = new Set<number>();
  /** Eventfd of each routed vector. */
  readonly routes = new Map<number, number>();
  /** Values of the status register that were written, in order. */
  readonly statusWrites: number[] = [];
  status = 0;
  driverFeatures = 0n;
  configVector = NO_VECTOR;
  generation = 0;
  queues: FakeQueue[] = [];
  /** Called for each doorbell rung. */
  onRing: (queue: number) => void = () => {};
  /** Called when the device has been reset. */
  onReset: () => void = () => {};

  readonly config: RegisterSpace;
  readonly interrupts: PciFunction["interrupts"];
  readonly lost: Promise<Error>;
  private readonly bar: RegisterSpace;
  private readonly offered: bigint;
  private readonly multiplier: number;
  private readonly shares: number | undefined;
  private readonly limits: Required<Pick<FakeFunctionOptions, "queues" | "queueSize">>;
  private select = { deviceFeature: 0, driverFeature: 0, queue: 0 };
  private resolveLost: (reason: Error) => void = () => {};

  constructor(options: FakeFunctionOptions = {}) {
    const { virtioId = 2, features = 0n, queues = 2, queueSize = 256, config = new Uint8Array(60) } = options;
    this.offered = features | featureBits(FeatureBit.version1);
    this.limits = { queues, queueSize };
    this.deviceConfig = config;
    this.multiplier = options.multiplier ?? 4;
    this.shares = options.shares;
    this.notifyOff = Array.from({ length: queues }, (_, queue) => queue);
    const notifySize = Math.max(PAGE_SIZE, queues * this.multiplier);
    this.configBytes = configSpace(virtioId, config.length, { multiplier: this.multiplier, size: notifySize });
    const vectors = options.vectors ?? queues + 1;
    this.lost = new Promise((resolve) => {
      this.resolveLost = resolve;
    });
    this.interrupts = {
      count: vectors,
      route: async (vector, eventfd) => {
        if (vector >= vectors) throw new VhostdError("noVectors", `no vector ${vector}`);
        if (eventfd === null) this.routes.delete(vector);
        else this.routes.set(vector, eventfd);
      },
    };
    this.config = space(this.configBytes.length, {
      read: (offset, width) => littleEndian(this.configBytes.subarray(offset, offset + width)),
      write: (offset, width, value) => this.configBytes.set(bytesOf(value, width), offset),
    });
    this.bar = space(PLACES.notify + notifySize, {
      read: (offset, width) => this.readBar(offset, width),
      write: (offset, width, value) => this.writeBar(offset, width, value),
    });
    this.clear();
  }

  region(bar: number): RegisterSpace {
    if (bar !== BAR) throw new VhostdError("barRead", `the fake function has no BAR ${bar}`);
    return this.bar;
  }

  doorbell(_bar: number, offset: number): Doorbell {
    const at = offset - PLACES.notify;
    const queue = this.notifyOff.indexOf(at / this.multiplier);
    const { shares } = this;
    const page = shares === undefined ? undefined : { offset: at - (at % PAGE_SIZE), size: PAGE_SIZE };
    return {
      ring: async (value) => this.ring(value),
      connect: () => {
        this.connected.add(queue);
        return { [Symbol.dispose]: () => this.connected.delete(queue) };
      },
      ...(this.takesKicks ? { takeKick: async (kick) => this.takeKick(queue, kick) } : {}),
      page,
      share: () => (shares === undefined || page === undefined ? undefined : { fd: shares, ...page }),
    };
  }

  async reset(): Promise<void> {
    this.clear();
  }

  private takeKick(queue: number, kick: number | null): void {
    if (kick === null) this.connected.delete(queue);
    else this.connected.add(queue);
  }

  /** The function is unplugged. */
  lose(reason: Error): void {
    this.resolveLost(reason);
  }

  /** Signals the vector of configuration changes. */
  interruptConfig(): void {
    const eventfd = this.routes.get(this.configVector);
    if (eventfd !== undefined) signalEventfd(eventfd);
  }

  snapshot() {
    return { data: null, fds: new Map<string, number>() };
  }

  abandon(): void {}

  async [Symbol.asyncDispose](): Promise<void> {}

  private ring(queue: number): void {
    this.rung.push(queue);
    this.onRing(queue);
  }

  private clear(): void {
    this.status = 0;
    this.driverFeatures = 0n;
    this.configVector = NO_VECTOR;
    this.select = { deviceFeature: 0, driverFeature: 0, queue: 0 };
    const { queues, queueSize } = this.limits;
    this.queues = Array.from({ length: queues }, () => ({
      size: queueSize,
      vector: NO_VECTOR,
      enable: 0,
      desc: 0n,
      driver: 0n,
      device: 0n,
    }));
    this.onReset();
  }

  private readBar(offset: number, width: number): number {
    if (offset >= PLACES.device && offset + width <= PLACES.device + this.deviceConfig.length) {
      return littleEndian(this.deviceConfig.subarray(offset - PLACES.device, offset - PLACES.device + width));
    }
    const register = registerAt(offset);
    return register === undefined ? 0 : this.readRegister(register);
  }

  private readRegister(register: CommonRegister): number {
    const queue = this.queues[this.select.queue];
    switch (register) {
      case "deviceFeature":
        return word(this.offered, this.select.deviceFeature);
      case "deviceStatus":
        return this.faults.silent ? 0xff : this.status;
      case "numQueues":
        return this.limits.queues;
      case "configVector":
        return this.configVector;
      case "configGeneration":
        if (this.faults.generationSpins) this.generation = (this.generation + 1) & 0xff;
        return this.generation;
      case "queueSize":
        return queue?.size ?? 0;
      case "queueVector":
        return queue?.vector ?? NO_VECTOR;
      case "queueEnable":
        return queue?.enable ?? 0;
      case "queueNotifyOff":
        return this.notifyOff[this.select.queue] ?? 0;
      default:
        return 0;
    }
  }

  private writeBar(offset: number, width: number, value: number): void {
    if (offset >= PLACES.notify) this.ring(value);
    else if (offset >= PLACES.device) this.deviceConfig.set(bytesOf(value, width), offset - PLACES.device);
    else this.writeRegister(offset, value);
  }

  private writeRegister(offset: number, value: number): void {
    const register = registerAt(offset);
    const queue = this.queues[this.select.queue];
    switch (register) {
      case "deviceFeatureSelect":
        this.select.deviceFeature = value;
        return;
      case "driverFeatureSelect":
        this.select.driverFeature = value;
        return;
      case "driverFeature":
        this.driverFeatures |= BigInt(value) << BigInt(32 * this.select.driverFeature);
        return;
      case "deviceStatus":
        this.writeStatus(value);
        return;
      case "configVector":
        this.configVector = this.grant(value);
        return;
      case "queueSelect":
        this.select.queue = value;
        return;
      default:
        if (queue !== undefined && register !== undefined) this.writeQueue(queue, register, offset, value);
    }
  }

  private writeQueue(queue: FakeQueue, register: CommonRegister, offset: number, value: number): void {
    const half = BigInt(value) << (offset % 8 === 4 ? 32n : 0n);
    switch (register) {
      case "queueSize":
        queue.size = value;
        return;
      case "queueVector":
        queue.vector = this.grant(value);
        return;
      case "queueEnable":
        if (!this.faults.queueEnableIgnored) queue.enable = value;
        return;
      case "queueDesc":
        queue.desc |= half;
        return;
      case "queueDriver":
        queue.driver |= half;
        return;
      case "queueDevice":
        queue.device |= half;
        return;
      default:
        return;
    }
  }

  private writeStatus(value: number): void {
    this.statusWrites.push(value);
    if (value === 0) {
      if (!this.faults.resetNeverEnds) this.clear();
      return;
    }
    const refused = (this.driverFeatures & (this.faults.refusedFeatures | ~this.offered)) !== 0n;
    this.status = refused ? value & ~Status.featuresOk : value;
  }

  private grant(vector: number): number {
    return vector < this.faults.vectorLimit ? vector : NO_VECTOR;
  }
}

/** Accesses are carried out when they are made, as their order demands; only the answer comes later. */
function space(
  size: number,
  access: {
    read(offset: number, width: number): number;
    write(offset: number, width: number, value: number): void;
  },
): RegisterSpace {
  return {
    size,
    read: async (offset: number, width: AccessWidth) => access.read(offset, width),
    write: async (offset: number, width: AccessWidth, value: number) => access.write(offset, width, value),
    readBytes: async (offset: number, length: number) =>
      Uint8Array.from({ length }, (_, i) => access.read(offset + i, 1) & 0xff),
  };
}

function configSpace(virtioId: number, configLength: number, notify: { multiplier: number; size: number }): Uint8Array {
  const bytes = new Uint8Array(PciConfig.size);
  const put = (at: number, ...values: number[]) => bytes.set(values, at);
  put(PciConfig.vendor, ...bytesOf(VIRTIO_VENDOR, 2), ...bytesOf(VIRTIO_DEVICE_BASE + virtioId, 2));
  put(PciConfig.status, 0x10);
  put(PciConfig.capabilities, FAKE_CAPS.msix);
  put(FAKE_CAPS.msix, PciCapability.msix, FAKE_CAPS.common);
  const capability = (at: number, next: number, type: number, offset: number, size: number) => {
    const value = {
      id: PciCapability.vendor,
      next,
      length: 20,
      type,
      bar: BAR,
      offset,
      size,
      multiplier: notify.multiplier,
    };
    const whole = VIRTIO_NOTIFY_CAP.encode(value);
    bytes.set(type === VirtioCapType.notify ? whole : whole.subarray(0, 16), at);
  };
  capability(FAKE_CAPS.common, FAKE_CAPS.notify, VirtioCapType.common, PLACES.common, 64);
  capability(FAKE_CAPS.notify, FAKE_CAPS.isr, VirtioCapType.notify, PLACES.notify, notify.size);
  capability(FAKE_CAPS.isr, FAKE_CAPS.device, VirtioCapType.isr, PLACES.isr, 1);
  capability(FAKE_CAPS.device, 0, VirtioCapType.device, PLACES.device, configLength);
  return bytes;
}

function registerAt(offset: number): CommonRegister | undefined {
  const fits = ([start, type]: readonly [number, "u8" | "u16" | "u32" | "u64", string]) =>
    offset >= start && offset < start + fieldSize(type);
  const found = Object.entries(COMMON_CONFIG).find(([, register]) => fits(register));
  return found?.[0] as CommonRegister | undefined;
}

function word(bits: bigint, index: number): number {
  return Number((bits >> BigInt(32 * index)) & 0xffff_ffffn);
}

function littleEndian(bytes: Uint8Array): number {
  return bytes.reduce((value, byte, i) => value + byte * 2 ** (8 * i), 0);
}

function bytesOf(value: number, width: number): number[] {
  return Array.from({ length: width }, (_, i) => Math.floor(value / 2 ** (8 * i)) & 0xff);
}
