import { VhostdError } from "../base/errors.ts";
import type { OwnedFd } from "../native/fd.ts";
import { fileInfo } from "../native/sys.ts";
import type { QueueState } from "../virtio/device-state.ts";
import { descSize, deviceSize, driverSize, isRingSize, RING_ALIGNMENT, RING_SIZE_MAX } from "../virtio/split-ring.ts";
import { type GuestMemory, regionOf } from "./guest-memory.ts";
import type { PayloadOf, VRING_ADDR } from "./messages.ts";
import type { RingRecord } from "./record.ts";
import type { RingEventfds } from "./target.ts";

/** Guest-physical. */
export type RingAddresses = Pick<QueueState, "desc" | "driver" | "device">;

export const RING_FDS = ["kick", "call", "err"] as const;
export type RingFd = (typeof RING_FDS)[number];

/**
 * One ring as the front-end has set it up. It is *started* by its kick and *enabled* by SET_VRING_ENABLE, two
 * independent states (vhost-user, "Ring states").
 */
export class Ring {
  /** Entries; 0 until SET_VRING_NUM. */
  size = 0;
  addresses: RingAddresses | undefined;
  /** Where the device goes on, mod 2^16: from SET_VRING_BASE, and after a stop what GET_VRING_BASE answers. */
  base = 0;
  started = false;
  enabled = false;
  readonly fds: Partial<Record<RingFd, OwnedFd>> = {};

  constructor(
    readonly index: number,
    /** Entries. */
    readonly sizeMax: number,
  ) {}

  /** The eventfd that starts the device on this ring's buffers, where it may use them now. */
  get liveKick(): number | undefined {
    return this.started && this.enabled ? this.fds.kick?.number : undefined;
  }

  get call(): number | undefined {
    return this.fds.call?.number;
  }

  /** Takes ownership of `fd`. @returns the earlier one, which the caller closes once nothing uses it */
  swapFd(which: RingFd, fd: OwnedFd | undefined): OwnedFd | undefined {
    const before = this.fds[which];
    if (fd === undefined) delete this.fds[which];
    else this.fds[which] = fd;
    return before;
  }

  /** @throws VhostdError protocol */
  setSize(size: number): void {
    const limit = Math.min(this.sizeMax, RING_SIZE_MAX);
    if (!isRingSize(size) || size > limit) {
      throw new VhostdError(
        "protocol",
        `ring ${this.index} has ${size} entries, must be a power of two, 1 to ${limit}`,
      );
    }
    this.size = size;
  }

  /**
   * The ring's front-end addresses as guest-physical ones, each part wholly inside one region and aligned.
   * @throws VhostdError protocol
   */
  resolve(addresses: PayloadOf<typeof VRING_ADDR>, memory: GuestMemory): RingAddresses {
    const size = Math.max(this.size, 1);
    const part = (name: string, address: number, bytes: number, alignment: number): number => {
      const gpa = memory.translate(address, bytes, `${name} of ring ${this.index}`);
      this.checkAlignment(name, gpa, alignment);
      return gpa;
    };
    return {
      desc: part("descriptor table", addresses.descriptor, descSize(size), RING_ALIGNMENT.desc),
      driver: part("available ring", addresses.available, driverSize(size), RING_ALIGNMENT.driver),
      device: part("used ring", addresses.used, deviceSize(size), RING_ALIGNMENT.device),
    };
  }

  /**
   * What the device is given. Memory may have changed since the addresses came, so they are checked once more.
   * @throws VhostdError protocol where the ring was not set up completely
   */
  ready(memory: Pick<GuestMemory, "list">): RingAddresses {
    if (this.size === 0) throw new VhostdError("protocol", `ring ${this.index} was started but has no size`);
    if (this.addresses === undefined) {
      throw new VhostdError("protocol", `ring ${this.index} was started but has no addresses`);
    }
    checkInside(this.index, this.size, this.addresses, memory.list);
    return this.addresses;
  }

  /** After the device has stopped: a new start needs a new kick and new addresses. Call and error fd stay. */
  stop(base: number): void {
    this.base = base;
    this.started = false;
    this.addresses = undefined;
    this.swapFd("kick", undefined)?.[Symbol.dispose]();
  }

  /** As RESET_DEVICE leaves it. */
  reset(): void {
    this.stop(0);
    this.enabled = false;
  }

  [Symbol.dispose](): void {
    for (const which of RING_FDS) this.swapFd(which, undefined)?.[Symbol.dispose]();
  }

  /** Undefined where the ring is as it was made. */
  snapshot(): RingRecord | undefined {
    const { index, size, base, started, enabled, addresses } = this;
    const untouched = size === 0 && base === 0 && !started && !enabled && addresses === undefined;
    if (untouched && Object.keys(this.fds).length === 0) return undefined;
    return { index, size, base, started, enabled, ...(addresses === undefined ? {} : { addresses }) };
  }

  /** @throws VhostdError where the record cannot be of this ring */
  revive(record: RingRecord, takeFd: (which: RingFd) => OwnedFd | undefined): void {
    if (record.size !== 0) this.setSize(record.size);
    this.base = record.base;
    this.started = record.started;
    this.enabled = record.enabled;
    this.addresses = record.addresses;
    for (const which of RING_FDS) {
      const fd = takeFd(which);
      if (fd !== undefined) checkEventfd(fd, `${which} fd of ring ${this.index}`);
      this.swapFd(which, fd);
    }
    // Nobody would ever be told that the guest has something to do.
    if (this.started && this.fds.kick === undefined) {
      throw new VhostdError("invalid", `the stored session lacks the fd kick.${this.index}, whose ring is started`);
    }
  }

  private checkAlignment(name: string, gpa: number, alignment: number): void {
    if (gpa % alignment === 0) return;
    throw new VhostdError(
      "protocol",
      `${name} of ring ${this.index} at 0x${gpa.toString(16)} is not a multiple of ${alignment}`,
    );
  }
}

/** @throws VhostdError protocol: any other file of a peer could block whoever waits for it */
export function checkEventfd(fd: OwnedFd, what: string): void {
  const { kind } = fileInfo(fd.number);
  if (kind !== "eventfd") throw new VhostdError("protocol", `${what} is of kind ${kind}, must be an eventfd`);
}

/** @throws VhostdError protocol where a part of the ring is not wholly inside one of `regions` */
export function checkInside(index: number, size: number, addresses: RingAddresses, regions: GuestMemory["list"]): void {
  const parts = [
    ["descriptor table", addresses.desc, descSize(size)],
    ["available ring", addresses.driver, driverSize(size)],
    ["used ring", addresses.device, deviceSize(size)],
  ] as const;
  for (const [name, gpa, bytes] of parts) {
    if (regionOf(regions, gpa, bytes) !== undefined) continue;
    throw new VhostdError(
      "protocol",
      `${name} of ring ${index} at 0x${gpa.toString(16)}, ${bytes} bytes, is not wholly inside one memory region any more`,
    );
  }
}

export function indices(rings: readonly Ring[]): number[] {
  return rings.map(({ index }) => index);
}

/** Borrowed. */
export function eventfdsOf(rings: readonly Ring[]): Map<number, RingEventfds> {
  return new Map(rings.map((ring) => [ring.index, { kick: ring.liveKick, call: ring.call }]));
}
