import { expect, test } from "bun:test";
import fc from "fast-check";
import { Deadline } from "../../src/base/deadline.ts";
import { VhostdError } from "../../src/base/errors.ts";
import { liveFds, type OwnedFd } from "../../src/native/fd.ts";
import { type RingConfig, RingEngine } from "../../src/native/ring-engine.ts";
import { eventfd, memfd, pwrite, truncate } from "../../src/native/sys.ts";
import { FeatureBit, featureBits } from "../../src/virtio/features.ts";
import { DriverQueue } from "../kit/driver-queue.ts";
import { DriverRing } from "../kit/driver-ring.ts";
import {
  EXTRA_BASE,
  EXTRA_SIZE,
  GUEST_BASE,
  GUEST_SIZE,
  type HostileRing,
  type HostileStep,
  hostileRing,
  RING_PLACES,
  requestPlace,
  tablePlace,
} from "../kit/fuzz/hostile-ring.ts";
import { FUZZ_TIMEOUT, fuzz } from "../kit/fuzz.ts";
import { GuestMemoryFile } from "../kit/guest-memory-file.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";
import { fullEventfd } from "../unit/native/full-eventfd.ts";

const DISK_SIZE = 1 << 20;
const soon = (what: string) => Deadline.after(10_000, what);

/** The driver's side of a ring that is nonsense, and the engine that it is nonsense to. */
class HostileDriver implements Disposable {
  private readonly owned = new DisposableStack();
  private readonly memory: OwnedFd;
  private readonly extra: OwnedFd;
  private readonly call: OwnedFd;
  private readonly full: OwnedFd;
  private readonly features: bigint;
  private available: number;
  private extraMapped = false;

  constructor(
    private readonly engine: RingEngine,
    private readonly ring: HostileRing,
  ) {
    this.memory = this.owned.use(memfd("hostile", GUEST_SIZE));
    this.extra = this.owned.use(memfd("hostile-extra", EXTRA_SIZE));
    this.call = this.owned.use(eventfd());
    this.full = this.owned.use(fullEventfd());
    this.features = featureBits(
      FeatureBit.version1,
      ...(ring.indirect ? [FeatureBit.ringIndirectDesc] : []),
      ...(ring.eventIdx ? [FeatureBit.ringEventIdx] : []),
    );
    this.available = ring.first;
    this.setIndex(ring.first);
  }

  async begin(): Promise<void> {
    await this.engine.map(GUEST_BASE, GUEST_SIZE, this.memory.number, 0, true);
    await this.activate([]);
    this.engine.setCall(0, this.call.number);
    this.engine.start(this.features);
  }

  async step(step: HostileStep): Promise<void> {
    switch (step.kind) {
      case "descriptor":
        return this.writeDescriptor(step);
      case "request": {
        const header = new DataView(new ArrayBuffer(16));
        header.setUint32(0, step.type, true);
        header.setBigUint64(8, step.sector, true);
        return this.write(requestPlace(step.at), new Uint8Array(header.buffer));
      }
      case "offer":
        for (const head of step.heads) {
          this.write16(RING_PLACES.driver + 4 + 2 * (this.available % this.ring.size), head);
          this.available = (this.available + 1) & 0xffff;
        }
        this.setIndex(this.available);
        return this.engine.notify(0);
      case "index":
        return this.setIndex(step.value);
      case "event":
        return this.write16(RING_PLACES.driver + 4 + 2 * this.ring.size, step.value);
      case "extra":
        return await this.mapExtra(step.mapped);
      case "cut":
        return truncate(this.memory.number, step.size);
      case "engine":
        return await this.disturb(step.what);
    }
  }

  /** Nothing of it is left in the engine. */
  async end(): Promise<void> {
    await this.engine.stop("drop", soon("stop"));
    await this.engine.unmapAll();
    this.engine.unquiesce();
    this.engine.setCall(0, null);
    await this.engine.configure({ slow: 0, outOfOrder: false });
  }

  [Symbol.dispose](): void {
    this.owned.dispose();
  }

  private async disturb(what: (HostileStep & { kind: "engine" })["what"]): Promise<void> {
    const { engine } = this;
    switch (what) {
      case "park":
        await engine.park(soon("park"));
        return accept(() => engine.start(this.features));
      case "quiesce":
        return await engine.quiesce();
      case "unquiesce":
        return engine.unquiesce();
      case "slow":
        return await engine.configure({ slow: 200_000 });
      case "quick":
        return await engine.configure({ slow: 0 });
      case "out of order":
        return await engine.configure({ outOfOrder: true });
      case "rings":
        expect(engine.inFlight()).toBeWithin(0, this.ring.size + 1);
        return accept(() => void engine.rings());
      case "stop and activate":
        await engine.stop("drop", soon("stop"));
        await this.activate(this.ring.inFlight);
        return accept(() => engine.start(this.features));
      case "call":
        return engine.setCall(0, this.call.number);
      case "no call":
        return engine.setCall(0, null);
      case "full call":
        return engine.setCall(0, this.full.number);
      default:
        return engine.notify(0);
    }
  }

  private async activate(inFlight: readonly number[]): Promise<void> {
    const { size } = this.ring;
    const places = { desc: BigInt(RING_PLACES.desc), driver: BigInt(RING_PLACES.driver) };
    const indices = { lastAvail: this.available, lastUsed: this.available };
    const config: RingConfig = { size, ...places, device: BigInt(RING_PLACES.device), ...indices, inFlight };
    await accept(() => this.engine.activate(0, config, this.features));
  }

  private async mapExtra(mapped: boolean): Promise<void> {
    if (mapped === this.extraMapped) return;
    if (mapped) await this.engine.map(EXTRA_BASE, EXTRA_SIZE, this.extra.number, 0, false);
    else await this.engine.unmap(EXTRA_BASE, EXTRA_SIZE);
    this.extraMapped = mapped;
  }

  private writeDescriptor({ table, index, value }: HostileStep & { kind: "descriptor" }): void {
    const bytes = new DataView(new ArrayBuffer(16));
    bytes.setBigUint64(0, value.address, true);
    bytes.setUint32(8, value.length, true);
    bytes.setUint16(12, value.flags, true);
    bytes.setUint16(14, value.next, true);
    this.write(tablePlace(table) + 16 * index, new Uint8Array(bytes.buffer));
  }

  private setIndex(value: number): void {
    this.write16(RING_PLACES.driver + 2, value);
  }

  private write16(address: number, value: number): void {
    this.write(address, Uint8Array.of(value & 0xff, (value >> 8) & 0xff));
  }

  private write(address: number, bytes: Uint8Array): void {
    pwrite(this.memory.number, bytes, address - GUEST_BASE);
  }
}

/** The engine may refuse, with a reason. */
async function accept(operation: () => void | Promise<void>): Promise<void> {
  try {
    await operation();
  } catch (error) {
    if (!(error instanceof VhostdError) || !["invalid", "busy"].includes(error.code)) throw error;
    expect(error.message).not.toBe("");
  }
}

/** A driver that behaves is served. */
async function behave(engine: RingEngine): Promise<void> {
  using memory = new GuestMemoryFile(GUEST_BASE, GUEST_SIZE);
  const features = featureBits(FeatureBit.version1, FeatureBit.ringEventIdx, FeatureBit.ringIndirectDesc);
  const ring = new DriverRing({ memory, base: GUEST_BASE, size: 16, features, bufferSpace: 64 << 10 });
  using queue = new DriverQueue(ring, () => engine.notify(0));
  await engine.map(GUEST_BASE, GUEST_SIZE, memory.file.number, 0, true);
  const { desc, driver, device } = ring;
  const places = { desc: BigInt(desc), driver: BigInt(driver), device: BigInt(device) };
  await engine.activate(0, { size: 16, ...places, lastAvail: 0, lastUsed: 0 }, features);
  engine.setCall(0, queue.call.number);
  engine.start(features);
  await soon("requests of a driver that behaves").race(new VerifiedDisk(0, 16, 4096).steps(queue, 4));
  await engine.stop("finish", soon("stop"));
  engine.setCall(0, null);
  await engine.unmapAll();
}

test(
  "whatever a driver does to its ring, the device serves it or fails with a reason, and then works again",
  async () => {
    using disk = memfd("disk", DISK_SIZE);
    const parameters = { fd: disk.number, capacity: DISK_SIZE, maxRanges: 4, maxRangeSectors: 1024 };
    const property = fc.asyncProperty(fc.array(hostileRing, { minLength: 1, maxLength: 3 }), async (rings) => {
      const before = liveFds();
      {
        const reasons: string[] = [];
        using engine = new RingEngine({ name: "blk", parameters }, 2, (reason) => reasons.push(reason));
        for (const ring of rings) {
          using driver = new HostileDriver(engine, ring);
          await driver.begin();
          for (const step of ring.steps) await driver.step(step);
          await driver.end();
          // What went wrong was said before: the last signal may still be on its way.
          await Bun.sleep(0);
          for (const reason of reasons) expect(reason).toMatch(/\w/);
          reasons.length = 0;
          await behave(engine);
          await Bun.sleep(0);
          expect(reasons).toEqual([]);
        }
      }
      expect(liveFds()).toBe(before);
    });
    await fuzz("rings of the block worker", property, { batch: 10 });
  },
  FUZZ_TIMEOUT,
);
