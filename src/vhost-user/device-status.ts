import { VhostdError } from "../base/errors.ts";
import { Status } from "../virtio/features.ts";
import { STATUS_FIRST_DOORBELL_ONLY } from "./messages.ts";

/** All of a device status (VIRTIO 1.2, 2.1). */
const STATUS_MASK = 0xff;

/** What SET_STATUS has said: the device status, and with EXTEND_STATUS more than that. */
export class DeviceStatus {
  constructor(readonly word = 0) {}

  /**
   * @param extended EXTEND_STATUS was negotiated
   * @throws VhostdError protocol
   */
  static parse(word: number, extended: boolean): DeviceStatus {
    const known = extended ? STATUS_MASK | STATUS_FIRST_DOORBELL_ONLY : STATUS_MASK;
    if (word <= known) return new DeviceStatus(word);
    throw new VhostdError("protocol", `status 0x${word.toString(16)} exceeds 0x${known.toString(16)}`);
  }

  /** As GET_STATUS answers it. */
  get byte(): number {
    return this.word & STATUS_MASK;
  }

  get driverOk(): boolean {
    return (this.word & Status.driverOk) !== 0;
  }

  /** The front-end maps no other doorbell than that of queue 0. */
  get firstDoorbellOnly(): boolean {
    return (this.word & STATUS_FIRST_DOORBELL_ONLY) !== 0;
  }

  /** The device cannot go on (VIRTIO 1.2, 2.1.2). */
  needingReset(): DeviceStatus {
    return new DeviceStatus(this.word | Status.needsReset);
  }
}
