import type { DmaRange } from "../../src/pci/address-space.ts";
import { sameRange } from "../../src/pci/ranges.ts";
import type { DeviceClass } from "../../src/plugin.ts";
import type { DoorbellShare, RingEventfds, SessionTarget } from "../../src/vhost-user/target.ts";
import type { DeviceState } from "../../src/virtio/device-state.ts";
import type { Tracking } from "../../src/virtio/dirty-log.ts";
import { FeatureBit, featureBits } from "../../src/virtio/features.ts";
import type { FreezeMode } from "../../src/virtio/mover.ts";
import { availIndex, type RingMemory } from "../../src/virtio/split-ring.ts";

export interface MockTargetOptions {
  readonly deviceClass?: DeviceClass;
  readonly deviceFeatures?: bigint;
  readonly queues?: number;
  readonly queueSizeMax?: number;
  readonly config?: Uint8Array;
  readonly doorbellShare?: SessionTarget["doorbellShare"];
  /** false unless said. */
  readonly dirtyTracking?: boolean;
  readonly presetup?: boolean;
}

/** A class of no particular device, with one field that can be written. */
export const mockDeviceClass: DeviceClass = {
  name: "mock",
  virtioId: 63,
  configSpace: { capacity: [0, "u64"], flags: [8, "u32"], mode: [12, "u8"] },
  writableConfig: ["mode"],
  features: { names: { 0: "ZERO", 1: "ONE", 50: "FIFTY" }, add: [50], hide: [1] },
  queues: () => 4,
};

const MOCK_FEATURES = featureBits(
  0,
  1,
  FeatureBit.ringIndirectDesc,
  FeatureBit.ringEventIdx,
  FeatureBit.version1,
  FeatureBit.accessPlatform,
  FeatureBit.ringPacked,
  FeatureBit.ringReset,
);

type Operation =
  | "start"
  | "prepare"
  | "track"
  | "stop"
  | "reset"
  | "release"
  | "enable"
  | "map"
  | "unmap"
  | "setKick"
  | "setCall"
  | "readConfig"
  | "writeConfig";

/**
 * A VF that does no I/O: it notes what a session does to it. When it is stopped it says that it has taken every
 * buffer that was made available.
 */
export class MockTarget implements SessionTarget {
  readonly deviceClass: DeviceClass;
  readonly deviceFeatures: bigint;
  readonly queues: number;
  readonly dirtyTracking: boolean;
  readonly presetup: boolean;
  /** What it marks pages for now. */
  tracking: Tracking | undefined;
  /** What it was prepared with, until it is started or reset. */
  prepared: DeviceState | undefined;
  /** Has the session told that not all is marked any more. */
  loseTracking: (error: Error) => void = () => {};
  /** One line a call, in order: "map 0x0+0x100000", "setKick 1 off". */
  readonly calls: string[] = [];
  readonly mapped: DmaRange[] = [];
  /** What runs, as it was started. */
  running: DeviceState | undefined;
  eventfds = new Map<number, RingEventfds>();
  /** Heads that it lists as in flight when it is allowed to, by queue. */
  readonly keeps = new Map<number, readonly number[]>();
  checkpoints = 0;
  /** How often it was told that a start is to be expected. */
  standBys = 0;
  /** Runs before the operation; throw in it to make it fail. */
  before: (operation: Operation) => Promise<void> | void = () => {};
  /** Runs when the device has started. */
  onStart: () => void = () => {};
  /** Runs in each checkpoint. */
  onCheckpoint: () => void = () => {};
  config: Uint8Array;
  readonly doorbellShare?: (queue: number) => Promise<DoorbellShare | undefined>;
  private readonly sizeMax: number;
  private configChange: () => void = () => {};

  constructor(options: MockTargetOptions = {}) {
    this.deviceClass = options.deviceClass ?? mockDeviceClass;
    this.deviceFeatures = options.deviceFeatures ?? MOCK_FEATURES;
    this.queues = options.queues ?? 4;
    this.dirtyTracking = options.dirtyTracking ?? false;
    this.presetup = options.presetup ?? false;
    this.sizeMax = options.queueSizeMax ?? 256;
    if (options.doorbellShare !== undefined) this.doorbellShare = options.doorbellShare;
    this.config = options.config ?? Uint8Array.of(1, 2, 3, 4, 5, 6, 7, 8, 9, 10);
  }

  queueSizeMax(): number {
    return this.sizeMax;
  }

  async readConfig(): Promise<Uint8Array> {
    await this.before("readConfig");
    return this.config;
  }

  async writeConfig(offset: number, bytes: Uint8Array): Promise<void> {
    await this.note("writeConfig", `${offset} ${bytes.toHex()}`);
  }

  async mapMemory(range: DmaRange): Promise<void> {
    await this.note("map", span(range));
    if (!this.mapped.some((other) => sameRange(other, range))) this.mapped.push(range);
  }

  async unmapMemory(range: DmaRange): Promise<void> {
    await this.note("unmap", span(range));
    const index = this.mapped.findIndex((other) => other.iova === range.iova && other.size === range.size);
    if (index < 0) throw new Error(`${span(range)} was not mapped`);
    this.mapped.splice(index, 1);
  }

  standBy(): void {
    this.standBys++;
  }

  async prepare(wanted: DeviceState): Promise<void> {
    await this.note("prepare", wanted.queues.map(({ index, lastAvail }) => `${index}@${lastAvail}`).join(" "));
    this.prepared = wanted;
  }

  async track(wanted: Tracking | undefined): Promise<void> {
    await this.note(
      "track",
      wanted === undefined ? "off" : `${wanted.log.size} bytes, end 0x${wanted.end.toString(16)}`,
    );
    this.tracking = wanted;
  }

  onTrackingLost(handler: (error: Error) => void): void {
    this.loseTracking = handler;
  }

  async start(wanted: DeviceState, eventfds: ReadonlyMap<number, RingEventfds>): Promise<void> {
    if (this.running !== undefined) throw new Error("started twice");
    await this.note("start", wanted.queues.map(({ index, lastAvail }) => `${index}@${lastAvail}`).join(" "));
    this.running = wanted;
    this.prepared = undefined;
    this.eventfds = new Map(eventfds);
    this.onStart();
  }

  async stop(memory: RingMemory, mode: FreezeMode): Promise<DeviceState> {
    if (this.running === undefined) throw new Error("stopped without a start");
    await this.note("stop", mode === "listed" ? mode : "");
    const { running } = this;
    this.running = undefined;
    const queues = running.queues.map(({ inFlight: _, ...queue }) => {
      const index = availIndex(memory, queue);
      const inFlight = mode === "listed" ? this.keeps.get(queue.index) : undefined;
      if (inFlight === undefined) return { ...queue, lastAvail: index, lastUsed: index };
      return { ...queue, lastAvail: index, lastUsed: (index - inFlight.length) & 0xffff, inFlight };
    });
    return { ...running, queues };
  }

  async reset(): Promise<void> {
    await this.note("reset");
    this.running = undefined;
    this.prepared = undefined;
  }

  async release(): Promise<void> {
    await this.note("release");
    this.running = undefined;
    this.prepared = undefined;
  }

  async enable(queues: ReadonlySet<number>, eventfds: ReadonlyMap<number, RingEventfds>): Promise<void> {
    if (this.running === undefined) throw new Error("rings enabled without a start");
    await this.note("enable", [...queues].join(" "));
    this.eventfds = new Map(eventfds);
    const flagged = this.running.queues.map(({ disabled: _, ...queue }) =>
      queues.has(queue.index) ? queue : { ...queue, disabled: true as const },
    );
    this.running = { ...this.running, queues: flagged };
  }

  async setKick(queue: number, fd: number | null): Promise<void> {
    await this.note("setKick", `${queue} ${fd === null ? "off" : "on"}`);
    this.eventfds.set(queue, { call: this.eventfds.get(queue)?.call, kick: fd ?? undefined });
  }

  async setCall(queue: number, fd: number | null): Promise<void> {
    await this.note("setCall", `${queue} ${fd === null ? "off" : "on"}`);
    this.eventfds.set(queue, { kick: this.eventfds.get(queue)?.kick, call: fd ?? undefined });
  }

  onConfigChange(handler: () => void): void {
    this.configChange = handler;
  }

  /** The device changes its configuration. */
  changeConfig(config: Uint8Array): void {
    this.config = config;
    this.configChange();
  }

  async checkpoint(): Promise<void> {
    this.checkpoints++;
    this.onCheckpoint();
  }

  private async note(operation: Operation, text = ""): Promise<void> {
    this.calls.push(`${operation} ${text}`.trim());
    await this.before(operation);
  }
}

function span({ iova, size }: DmaRange): string {
  return `0x${iova.toString(16)}+0x${size.toString(16)}`;
}
