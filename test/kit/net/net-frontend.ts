import type { OwnedFd } from "../../../src/native/fd.ts";
import { connectUnix } from "../../../src/native/sys.ts";
import { ProtocolFeature, Request } from "../../../src/vhost-user/messages.ts";
import { FeatureBit, featureBits, hasFeature, Status } from "../../../src/virtio/features.ts";
import { type NegotiateOptions, VhostUserFrontend } from "../frontend/frontend.ts";

/** Of VIRTIO 1.2, 5.1.3: what tests speak of. */
export const NetFeature = {
  mtu: 3,
  mac: 5,
  mrgRxbuf: 15,
  status: 16,
  ctrlVq: 17,
  ctrlRx: 18,
  guestAnnounce: 21,
  mq: 22,
} as const;

/** Bits that belong to the device class. */
const CLASS_BITS = ((1n << 24n) - 1n) | (((1n << 14n) - 1n) << 50n);
const RUNNING = Status.acknowledge | Status.driver | Status.featuresOk | Status.driverOk;
/** What a driver without offloads takes of a device. */
const DRIVER_FEATURES = featureBits(NetFeature.mtu, NetFeature.mac, NetFeature.status, NetFeature.mq);

export interface NetFrontendOptions {
  /** Queue pairs that get rings; 1 unless said. */
  readonly pairs?: number;
  /** Of these, how many the guest uses from the start; all unless said. */
  readonly enabled?: number;
  /** MRG_RXBUF is acknowledged; so it is unless said. */
  readonly mergeable?: boolean;
  /** Of what is offered, only this. */
  readonly features?: bigint;
  readonly protocolFeatures?: bigint;
}

/**
 * A front-end that sends what QEMU's network front-end does: each queue pair is a device of its own behind one socket,
 * enabled or disabled by itself, and a stop asks the rings for their indices without disabling them.
 */
export class NetFrontend extends VhostUserFrontend {
  readonly pairs: number;
  /** Pairs in use, from the first on. */
  enabled: number;
  private readonly options: NetFrontendOptions;

  constructor(fd: OwnedFd, options: NetFrontendOptions = {}) {
    super(fd);
    this.options = options;
    this.pairs = options.pairs ?? 1;
    this.enabled = options.enabled ?? this.pairs;
  }

  static override connect(path: string, options: NetFrontendOptions = {}): NetFrontend {
    return new NetFrontend(connectUnix(path), options);
  }

  get mergeable(): boolean {
    return hasFeature(this.features, NetFeature.mrgRxbuf);
  }

  /** 1 15 16 17 36 21 3 for the first pair, 1 15 16 36 for each further one, 18 for all before any features. */
  override async negotiate(options: NegotiateOptions = {}): Promise<void> {
    const { mergeable = true, features = ~0n, protocolFeatures = ~0n } = this.options;
    const driver = mergeable ? DRIVER_FEATURES | featureBits(NetFeature.mrgRxbuf) : DRIVER_FEATURES;
    await super.negotiate({
      features: (options.features ?? ~0n) & features & (driver | ~CLASS_BITS),
      protocolFeatures: (options.protocolFeatures ?? ~0n) & protocolFeatures,
    });
    for (let pair = 1; pair < this.pairs; pair++) await this.repeatNegotiation();
    for (let pair = 0; pair < this.pairs; pair++) await this.enablePair(pair, pair === 0);
  }

  /** 18 18 per pair, 2 and the status before the rings, 8 10 9 12 13 per ring, the status that runs the device. */
  override async resumeQueues(bases: readonly number[]): Promise<void> {
    for (let pair = 0; pair < this.pairs; pair++) {
      const rings = this.queues.filter(({ index }) => index >> 1 === pair);
      await this.enablePair(pair, pair < this.enabled);
      await this.setFeatures();
      await this.setStatus(Status.featuresOk);
      for (const ring of rings) await this.setupQueue(ring, bases[ring.index] ?? 0);
    }
    await this.setStatus(RUNNING);
  }

  /** 11 per queue, and 39(0) before ("old") or after it ("new"). */
  override async stop({ order }: { order: "old" | "new" }): Promise<number[]> {
    if (order === "old") await this.setStatus(0);
    const bases: number[] = [];
    for (const { index } of this.queues) bases[index] = await this.getBase(index);
    if (order === "new") await this.setStatus(0);
    return bases;
  }

  /** As `ethtool -L` of a guest: the first pairs are enabled, the others are not. */
  async useOnly(pairs: number): Promise<void> {
    this.enabled = pairs;
    for (let pair = 0; pair < this.pairs; pair++) await this.enablePair(pair, pair < pairs);
  }

  async enablePair(pair: number, enabled: boolean): Promise<void> {
    await this.enable(2 * pair, enabled);
    await this.enable(2 * pair + 1, enabled);
  }

  private async repeatNegotiation(): Promise<void> {
    await this.askU64(Request.GET_FEATURES);
    if (!hasFeature(this.features, FeatureBit.vhostUserProtocolFeatures)) return;
    await this.askU64(Request.GET_PROTOCOL_FEATURES);
    await this.send(Request.SET_PROTOCOL_FEATURES, new Uint8Array(BigUint64Array.of(this.protocolFeatures).buffer));
    if (this.has(ProtocolFeature.CONFIGURE_MEM_SLOTS)) await this.ask(Request.GET_MAX_MEM_SLOTS);
  }
}
