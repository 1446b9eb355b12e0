import { asError, VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { OwnedFd } from "../native/fd.ts";
import { isUnixStream } from "../native/sys.ts";
import { FeatureBit, featureBits, hasFeature, Status } from "../virtio/features.ts";
import type { FreezeMode } from "../virtio/mover.ts";
import { usedIndex } from "../virtio/split-ring.ts";
import { BackChannel } from "./back-channel.ts";
import { BoundedLog } from "./bounded-log.ts";
import { ConfigAhead } from "./config-ahead.ts";
import { DeviceStatus } from "./device-status.ts";
import { DirtyLogging } from "./dirty-logging.ts";
import { checkOffered, functionFeatures, offeredFeatures, offeredProtocolFeatures } from "./features.ts";
import { GuestMemory } from "./guest-memory.ts";
import { ProtocolFeature } from "./messages.ts";
import type { SessionRecord } from "./record.ts";
import { eventfdsOf, indices, Ring, type RingFd } from "./rings.ts";
import { decodeState, encodeRegions, encodeState, reviveRegions, snapshotFds, word } from "./snapshot.ts";
import { featuresOf, type SessionState, transition } from "./state.ts";
import type { SessionTarget } from "./target.ts";
import { checkModern, preparedQueue, startedQueue, wantedState } from "./wanted-state.ts";

const LOG_ALL = featureBits(FeatureBit.vhostLogAll);

/**
 * What one front-end has set up, and the function that runs on it: the part of a session that knows nothing of
 * messages. Every change of the function goes through here, in the order of the state machine.
 */
export class Backend {
  state: SessionState;
  protocolFeatures: bigint;
  /** For lines that a front-end can cause again and again. */
  readonly chatter: BoundedLog;
  readonly offered: bigint;
  readonly offeredProtocol: bigint;
  readonly memory: GuestMemory;
  readonly rings: readonly Ring[];
  readonly logging: DirtyLogging;
  readonly config: ConfigAhead;
  /** Why memory of the guest was refused, where the function has not run since. */
  refusedMemory: Error | undefined;
  /** An earlier process may have handled the message that is handled: the record has it then. */
  mayRepeat = false;
  private said: DeviceStatus;
  /** What the function keeps of a ring between a stop and the start that follows at once, by queue. */
  private readonly inFlight = new Map<number, readonly number[]>();
  private channel: BackChannel | undefined;
  /** A start has begun and has not ended. */
  private starting: boolean;

  /**
   * @param record where the session is: FRESH_RECORD, or what `snapshot` gave
   * @param takeFd hands over the fd of that name
   * @throws VhostdError where record and fds do not fit the target
   */
  constructor(
    readonly target: SessionTarget,
    readonly log: Logger,
    record: SessionRecord,
    takeFd: (name: string) => OwnedFd | undefined,
  ) {
    this.chatter = new BoundedLog(log);
    this.offered = offeredFeatures(target);
    this.offeredProtocol = offeredProtocolFeatures(target);
    this.protocolFeatures = BigInt(record.protocolFeatures);
    this.said = new DeviceStatus(record.status);
    this.config = new ConfigAhead(target);
    this.starting = record.starting ?? false;
    this.state = decodeState(record.state);
    // Pages may be marked for a front-end to which that would not be offered now.
    checkOffered(featuresOf(this.state), this.offered | LOG_ALL, "stored features");
    this.memory = new GuestMemory(target, reviveRegions(record, takeFd), record.removed);
    this.rings = Array.from({ length: target.queues }, (_, index) => new Ring(index, target.queueSizeMax(index)));
    for (const ring of record.rings) {
      this.ring(ring.index).revive(ring, (which) => takeFd(`${which}.${ring.index}`));
    }
    if (this.state.kind === "running") for (const index of this.state.queues) this.ring(index).ready(this.memory);
    this.logging = new DirtyLogging(target, this.memory, log, this.chatter, record.unmarked);
    if (record.log !== undefined) this.logging.revive(record.log, takeFd("log"));
    const channel = takeFd("backend");
    if (channel !== undefined) this.setBackChannel(channel);
  }

  has(protocolFeature: number): boolean {
    return hasFeature(this.protocolFeatures, protocolFeature);
  }

  /** @throws VhostdError protocol */
  ring(index: number): Ring {
    const ring = this.rings[index];
    if (ring === undefined) {
      throw new VhostdError("protocol", `queue index ${index} is out of range, there are ${this.rings.length} queues`);
    }
    return ring;
  }

  /** SET_FEATURES. On a running device it changes nothing that the device knows of. */
  async acknowledge(features: bigint): Promise<void> {
    checkOffered(features, this.offered, "acknowledged features");
    await this.beginSetUp();
    if (this.state.kind === "running") {
      if (functionFeatures(features, this.target) !== functionFeatures(this.state.features, this.target)) {
        throw new VhostdError(
          "protocol",
          `features 0x${features.toString(16)} differ from those the device runs with, 0x${this.state.features.toString(16)}`,
        );
      }
    }
    this.state = transition(this.state, { type: "acknowledge", features });
    if (this.state.kind !== "running") this.config.ask();
    // Without the protocol features a front-end does not enable rings: they are from the start ("Ring states").
    if (!hasFeature(features, FeatureBit.vhostUserProtocolFeatures)) for (const ring of this.rings) ring.enabled = true;
  }

  /** SET_PROTOCOL_FEATURES. */
  acknowledgeProtocol(features: bigint): void {
    checkOffered(features, this.offeredProtocol, "acknowledged protocol features");
    this.protocolFeatures = features;
  }

  /** Device status as the front-end reads it: FEATURES_OK only where the features are acceptable (VIRTIO 1.2, 2.1). */
  get status(): number {
    const acceptable = hasFeature(featuresOf(this.state), FeatureBit.version1);
    return acceptable ? this.said.byte : this.said.byte & ~Status.featuresOk;
  }

  /**
   * SET_STATUS. Status 0 on a running device stops nothing yet: a front-end that writes it first still asks each ring
   * for its index, and after that the function keeps its state, because `cont` wants to go on from it.
   */
  async setStatus(word: number): Promise<void> {
    const next = DeviceStatus.parse(word, this.has(ProtocolFeature.EXTEND_STATUS));
    if (next.byte !== 0) await this.beginSetUp();
    this.said = next;
    const isDue = this.mayStart && this.state.kind !== "running" && this.startedRings.length > 0;
    if (next.driverOk && isDue) await this.start();
  }

  /** The function says that it cannot go on (VIRTIO 1.2, 2.1.2). One that was given up already need not say so. */
  needsReset(): void {
    if (this.said.byte === 0) return;
    this.said = this.said.needingReset();
    this.configChanged();
  }

  /** Before a front-end sets up anew: what it gave up with status 0 without asking for indices ends here. */
  async beginSetUp(): Promise<void> {
    if (this.state.kind !== "running" || !this.givenUp) return;
    await this.target.reset();
    for (const ring of this.startedRings) ring.stop(0);
    this.state = transition(this.state, { type: "reset" });
  }

  /** The function works on this ring. */
  runs(ring: Ring): boolean {
    return this.state.kind === "running" && this.state.queues.includes(ring.index);
  }

  /** The function is to be told something for which more messages are waited for first. */
  get isBehind(): boolean {
    return this.startDue || this.enableDue || this.disableDue;
  }

  /** Something is done when no message has come for a while. */
  get awaitsQuiet(): boolean {
    return this.isBehind || this.logging.loss !== undefined;
  }

  /** Not all is marked that the function wrote, and the front-end has seen what is. */
  get pagesSeen(): boolean {
    return this.logging.isSeen(this.wantsLogging);
  }

  /**
   * Tells the function what it is behind with.
   * @returns whether anything has changed
   * @throws VhostdError where not all is marked that the function wrote, as soon as the session may end for it
   */
  async catchUp(): Promise<boolean> {
    if (this.logging.mayEnd(this.wantsLogging)) throw this.logging.loss;
    if (this.startDue) await this.start();
    else if (this.enableDue || this.disableDue) await this.applyEnabled();
    else return false;
    return true;
  }

  /** Goes on where an earlier process has died: with a start, and with doorbells of which it may not have told. */
  async goOn(): Promise<void> {
    await this.followLogging();
    if (!this.starting || !this.mayStart)
      return await this.shareDoorbells(this.rings.filter((ring) => this.runs(ring)));
    await this.start();
    await this.followLogging();
  }

  /**
   * Lets the function run on all started rings, using those that are enabled. Where it runs already, on fewer of them,
   * it is stopped and goes on.
   * @throws VhostdError where the set-up is incomplete or the function does not take it
   */
  async start(): Promise<void> {
    await this.memory.ensureMapped();
    // A ring that the function still uses has its requests in flight: it is disabled afterwards, when they are given back.
    const inUse = this.state.kind === "running" ? this.state.enabled : [];
    const isUsed = (ring: Ring) => ring.enabled || inUse.includes(ring.index);
    if (this.state.kind === "running") await this.freeze("listed");
    const features = featuresOf(this.state);
    checkModern(features);
    const started = this.startedRings;
    const queues = started.map((ring) => startedQueue(ring, this.memory, isUsed(ring), this.inFlight.get(ring.index)));
    this.inFlight.clear();
    const enabled = started.filter(isUsed);
    const next = transition(this.state, { type: "start", queues: indices(started), enabled: indices(enabled) });
    const config = await this.config.take();
    this.starting = true;
    await this.target.start(wantedState(this.target, features, config, queues), eventfdsOf(started));
    this.starting = false;
    this.state = next;
    this.refusedMemory = undefined;
    const used = enabled.length === started.length ? "" : `, ${enabled.length} of them enabled`;
    this.log.info(
      `running with ${started.length} of ${this.rings.length} queues${used}, features 0x${features.toString(16)}`,
    );
    await this.shareDoorbells(started);
  }

  /** PRESETUP: what is set up from here on is only prepared. */
  async beginPreparing(): Promise<void> {
    await this.beginSetUp();
    this.state = transition(this.state, { type: "prepare" });
  }

  /**
   * PRESETUP, the end: the function is given what was set up and does not run on it. All that is not taken early, the start
   * that follows does, for which every ring is set up once more.
   */
  async endPreparing(): Promise<void> {
    const next = transition(this.state, { type: "prepared" });
    const rings = this.startedRings;
    try {
      if (rings.length > 0) await this.prepare(rings);
    } catch (error) {
      this.chatter.warn(`the device could not be set up early: ${asError(error).message}`);
    }
    for (const ring of this.rings) ring.stop(ring.base);
    this.state = next;
  }

  /**
   * Has the function mark what it writes as the front-end wants it now. Where that is not possible the function stands still
   * when this resolves, and nothing is started any more.
   * @throws VhostdError where it cannot be stopped either
   */
  async followLogging(): Promise<void> {
    try {
      await this.logging.follow(this.wantsLogging, this.state.kind === "running");
    } catch (error) {
      await this.loseTracking(asError(error));
    }
  }

  /** The function writes what nobody marks: it is stopped, and all pages are marked. @throws VhostdError as above */
  async loseTracking(error: Error): Promise<void> {
    if (this.logging.loss !== undefined) return;
    this.log.error("the device is stopped, because not every page that it writes is marked", error);
    if (this.state.kind === "running") {
      try {
        await this.freeze("drained");
      } catch (failure) {
        await this.resetRunning(asError(failure));
      }
    }
    for (const ring of this.startedRings) ring.stop(ring.base);
    await this.logging.lose(error);
  }

  /**
   * GET_VRING_BASE: the first ring that is asked for stops all. To a VMM in migration a connection that is lost means that
   * there is nothing more to see in its log: where one is kept it is answered also for a device that does not stop.
   * @returns the index where this ring goes on
   */
  async stopRing(ring: Ring): Promise<number> {
    if (this.runs(ring)) {
      try {
        await this.freeze("drained");
      } catch (failure) {
        if (!this.logging.isOn) throw failure;
        await this.resetRunning(asError(failure));
      }
      for (const other of this.startedRings) other.stop(other.base);
    }
    ring.stop(ring.base);
    return ring.base;
  }

  /** RESET_DEVICE: rings as they were made, memory and features stay. */
  async reset(): Promise<void> {
    this.config.forget();
    await this.target.reset();
    this.state = transition(this.state, { type: "reset" });
    this.said = new DeviceStatus();
    for (const ring of this.rings) ring.reset();
  }

  /**
   * SET_VRING_ENABLE. A running function uses a ring that is enabled at once; the record says so first, because the
   * function may stand still meanwhile, and whoever comes after us has to go on with it. One that is disabled loses its
   * kick at once; the function learns of it with the next change or in a quiet moment: a front-end that stops disables
   * one ring after the other, and each change of a managed function is a freeze.
   */
  async enable(ring: Ring, enabled: boolean): Promise<void> {
    const changed = ring.enabled !== enabled;
    ring.enabled = enabled;
    if (this.state.kind !== "running" || !this.runs(ring)) return;
    const isNew = enabled && !this.state.enabled.includes(ring.index);
    if (!isNew && !changed) return;
    if (isNew && !this.givenUp) {
      await this.target.checkpoint();
      await this.applyEnabled();
    } else await this.target.setKick(ring.index, ring.liveKick ?? null);
  }

  /**
   * SET_VRING_KICK, CALL, ERR: routed anew without a stop. Takes ownership of `fd`; undefined where the message says
   * that none comes (the side that would be signalled polls).
   */
  async setRingFd(ring: Ring, which: RingFd, fd: OwnedFd | undefined): Promise<void> {
    using undo = new DisposableStack();
    undo.use(fd);
    if (which === "kick") {
      await this.beginSetUp();
      ring.started = true;
    }
    undo.move();
    using _before = ring.swapFd(which, fd);
    if (!this.runs(ring)) return;
    if (which === "kick") await this.target.setKick(ring.index, ring.liveKick ?? null);
    if (which === "call") await this.target.setCall(ring.index, ring.call ?? null);
  }

  /** Takes ownership of `fd`, in the place of an earlier one. @throws VhostdError protocol */
  setBackChannel(fd: OwnedFd): void {
    if (!isUnixStream(fd.number)) {
      fd[Symbol.dispose]();
      throw new VhostdError("protocol", "the fd of the back-end channel is no unix stream socket");
    }
    this.channel = this.channel?.succeededBy(fd) ?? new BackChannel(fd, this.chatter);
  }

  get canTellChanges(): boolean {
    return this.has(ProtocolFeature.CONFIG) && this.channel !== undefined;
  }

  /** Tells the front-end that the configuration space changed, where it can be told. */
  configChanged(): void {
    this.config.forget();
    if (this.canTellChanges) this.channel?.configChanged();
  }

  snapshot(): { record: SessionRecord; fds: Map<string, number> } {
    const fds = snapshotFds(this.memory.list, this.rings);
    const log = this.logging.snapshot();
    if (log !== undefined) fds.set("log", log.fd);
    if (this.channel !== undefined) fds.set("backend", this.channel.fd);
    const record: SessionRecord = {
      state: encodeState(this.state),
      protocolFeatures: word(this.protocolFeatures),
      status: this.said.word,
      regions: encodeRegions(this.memory.list),
      removed: [...this.memory.removed],
      rings: this.rings.flatMap((ring) => ring.snapshot() ?? []),
      ...(log?.record === undefined ? {} : { log: log.record }),
      ...(this.logging.ranUnmarked ? { unmarked: true } : {}),
      ...(this.starting ? { starting: true } : {}),
    };
    return { record, fds };
  }

  /** Nothing of the front-end is in use by the function any more, and none of its fds is open. Never throws. */
  async close(reason: string): Promise<void> {
    this.state = transition(this.state, { type: "close", reason });
    const regions = this.memory.list;
    let atRest = true;
    try {
      await this.target.release(this.memory);
    } catch (error) {
      atRest = false;
      this.log.error("the function could not be reset", asError(error));
    }
    await this.logging.end();
    for (const failure of await this.memory.clear()) {
      this.log.error("guest memory could not be unmapped", asError(failure));
    }
    if (!atRest) await this.logging.complete(regions);
    this.closeFds();
  }

  /** Closes every fd and leaves the function as it is. */
  async abandon(): Promise<void> {
    this.closeFds();
    await this.memory.abandon();
  }

  /** The front-end has written status 0: what still runs is about to be stopped or reset. */
  private get givenUp(): boolean {
    return this.has(ProtocolFeature.STATUS) && this.said.byte === 0;
  }

  private get wantsLogging(): boolean {
    return (featuresOf(this.state) & LOG_ALL) !== 0n;
  }

  /** Nothing keeps the function from being started. */
  private get mayStart(): boolean {
    return this.state.kind !== "preparing" && this.logging.loss === undefined;
  }

  /**
   * The function should have rings that it does not have yet: with STATUS since DRIVER_OK, without it as soon as every
   * ring that was set up is started and at least one is enabled.
   */
  private get startDue(): boolean {
    const started = this.startedRings;
    if (this.state.kind === "connected" || !this.mayStart || started.every((ring) => this.runs(ring))) return false;
    // QEMU 7.2 says DRIVER_OK for some of its devices only. Where all rings are in use none can follow.
    const complete = this.rings.every((ring) => ring.started && ring.enabled && ring.addresses !== undefined);
    if (this.has(ProtocolFeature.STATUS)) return this.said.driverOk || (complete && !this.givenUp);
    const setUp = this.rings.filter((ring) => ring.started || ring.addresses !== undefined);
    return setUp.every((ring) => ring.started) && started.some((ring) => ring.enabled);
  }

  /** The function does not use all rings that were enabled: an earlier process has died before it had told it so. */
  private get enableDue(): boolean {
    if (this.state.kind !== "running" || this.givenUp) return false;
    const { queues, enabled } = this.state;
    return queues.some((index) => this.ring(index).enabled && !enabled.includes(index));
  }

  /** The function uses rings that were disabled. A front-end that disables all of them stops them next. */
  private get disableDue(): boolean {
    if (this.state.kind !== "running" || this.givenUp) return false;
    const used = this.state.enabled.map((index) => this.ring(index).enabled);
    return used.includes(true) && used.includes(false);
  }

  /** The running function uses exactly the enabled rings from now on. */
  private async applyEnabled(): Promise<void> {
    const running = this.rings.filter((ring) => this.runs(ring));
    const enabled = indices(running.filter((ring) => ring.enabled));
    await this.target.enable(new Set(enabled), eventfdsOf(running), this.memory);
    this.state = transition(this.state, { type: "enable", enabled });
    this.log.info(`queues ${enabled.join(" ")} are enabled, of ${running.length}`);
  }

  private get startedRings(): readonly Ring[] {
    return this.rings.filter((ring) => ring.started);
  }

  /** Stops the function; the rings know their indices then. */
  private async freeze(mode: FreezeMode): Promise<void> {
    const seen = await this.target.stop(this.memory, mode);
    this.inFlight.clear();
    for (const { index, lastAvail, inFlight } of seen.queues) {
      this.ring(index).base = lastAvail;
      if (inFlight !== undefined) this.inFlight.set(index, inFlight);
    }
    this.state = transition(this.state, { type: "stop" });
  }

  /** The running function does not stop: what it has not given back is to be done again. @throws VhostdError */
  private async resetRunning(failure: Error): Promise<void> {
    this.log.error("the device is reset, because it does not stop", failure);
    await this.target.reset();
    const ran = this.startedRings.filter((ring) => this.runs(ring));
    for (const ring of ran) ring.base = usedIndex(this.memory, ring.ready(this.memory));
    this.state = transition(this.state, { type: "reset" });
  }

  private async prepare(rings: readonly Ring[]): Promise<void> {
    const features = featuresOf(this.state);
    checkModern(features);
    const queues = rings.map((ring) => preparedQueue(ring, this.memory));
    await this.target.prepare(wantedState(this.target, features, await this.config.take(), queues));
    this.chatter.info(`${queues.length} of ${this.rings.length} queues are set up early`);
  }

  private async shareDoorbells(rings: readonly Ring[]): Promise<void> {
    if (!this.has(ProtocolFeature.HOST_NOTIFIER) || !this.has(ProtocolFeature.BACKEND_SEND_FD)) return;
    const wanted = this.said.firstDoorbellOnly ? rings.filter(({ index }) => index === 0) : rings;
    await this.channel?.shareDoorbells(this.target, indices(wanted));
  }

  private closeFds(): void {
    this.logging[Symbol.dispose]();
    this.channel?.[Symbol.dispose]();
    for (const ring of this.rings) ring[Symbol.dispose]();
  }
}
