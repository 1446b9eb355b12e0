import { fieldSize } from "../base/layout.ts";
import { COMMON_CONFIG, type CommonRegister, NO_VECTOR } from "../virtio/registers.ts";
import { VirtioBlock } from "./layout.ts";

/** The device as its driver has set it up (VIRTIO 1.2, 4.1.4.3), queues apart. */
export interface DriverState {
  status: number;
  deviceFeatureSelect: number;
  driverFeatureSelect: number;
  driverFeatures: bigint;
  configVector: number;
  queueSelect: number;
}

export interface QueueRegisters {
  size: number;
  vector: number;
  enabled: boolean;
  desc: bigint;
  driver: bigint;
  device: bigint;
}

const RESET_STATE: Readonly<DriverState> = {
  status: 0,
  deviceFeatureSelect: 0,
  driverFeatureSelect: 0,
  driverFeatures: 0n,
  configVector: NO_VECTOR,
  queueSelect: 0,
};

/** The common configuration of a device: contents only, nothing follows from a change. */
export class DeviceRegisters {
  state: DriverState = { ...RESET_STATE };
  readonly queues: QueueRegisters[];
  generation = 0;

  /**
   * @param features that the device offers
   * @param ringSize largest size of each queue, entries
   */
  constructor(
    readonly features: bigint,
    queues: number,
    readonly ringSize: number,
  ) {
    this.queues = Array.from({ length: queues }, () => freshQueue(ringSize));
  }

  /** The queue that the driver has selected, where there is one. */
  get selected(): QueueRegisters | undefined {
    return this.queues[this.state.queueSelect];
  }

  /** Nothing of the driver is left; the generation goes on. */
  reset(): void {
    this.state = { ...RESET_STATE };
    for (const index of this.queues.keys()) this.queues[index] = freshQueue(this.ringSize);
  }

  read(offset: number, length: number): Uint8Array {
    const image = new Uint8Array(VirtioBlock.common.size);
    const view = new DataView(image.buffer);
    for (const [name, [at, type]] of Object.entries(COMMON_CONFIG)) {
      const value = this.value(name as CommonRegister);
      if (type === "u64") view.setBigUint64(at, BigInt(value), true);
      else if (type === "u32") view.setUint32(at, Number(value), true);
      else if (type === "u16") view.setUint16(at, Number(value), true);
      else view.setUint8(at, Number(value));
    }
    return image.slice(offset, offset + length);
  }

  /** One half of a 64-bit register of the selected queue, which cannot be changed while it is enabled. */
  writeHalf(name: CommonRegister, shift: bigint, value: number): void {
    const queue = this.selected;
    if (queue === undefined || queue.enabled) return;
    const replace = (word: bigint) => (word & ~(0xffff_ffffn << shift)) | (BigInt(value) << shift);
    if (name === "queueDesc") queue.desc = replace(queue.desc);
    else if (name === "queueDriver") queue.driver = replace(queue.driver);
    else if (name === "queueDevice") queue.device = replace(queue.device);
  }

  private value(name: CommonRegister): number | bigint {
    const { state } = this;
    const queue = this.selected;
    switch (name) {
      case "deviceFeatureSelect":
        return state.deviceFeatureSelect;
      case "deviceFeature":
        return featureHalf(this.features, state.deviceFeatureSelect);
      case "driverFeatureSelect":
        return state.driverFeatureSelect;
      case "driverFeature":
        return featureHalf(state.driverFeatures, state.driverFeatureSelect);
      case "configVector":
        return state.configVector;
      case "numQueues":
        return this.queues.length;
      case "deviceStatus":
        return state.status;
      case "configGeneration":
        return this.generation;
      case "queueSelect":
        return state.queueSelect;
      case "queueSize":
        return queue?.size ?? 0;
      case "queueVector":
        return queue?.vector ?? NO_VECTOR;
      case "queueEnable":
        return queue?.enabled === true ? 1 : 0;
      case "queueNotifyOff":
      case "queueNotifyData":
        return queue === undefined ? 0 : state.queueSelect;
      case "queueDesc":
        return queue?.desc ?? 0n;
      case "queueDriver":
        return queue?.driver ?? 0n;
      case "queueDevice":
        return queue?.device ?? 0n;
      // The vendor's administration commands are older than the registers of the standard's.
      case "queueReset":
      case "adminQueueIndex":
      case "adminQueueNum":
        return 0;
    }
  }
}

/** What a write to the common configuration is: a whole register, one half of a 64-bit one, or nothing. */
export function registerAt(
  offset: number,
  length: number,
): { readonly name: CommonRegister; readonly half?: bigint } | undefined {
  for (const [key, [at, type]] of Object.entries(COMMON_CONFIG)) {
    const name = key as CommonRegister;
    if (type === "u64" && length === 4 && (offset === at || offset === at + 4)) {
      return { name, half: offset === at ? 0n : 32n };
    }
    if (offset === at && length === fieldSize(type)) return { name };
  }
  return undefined;
}

function freshQueue(size: number): QueueRegisters {
  return { size, vector: NO_VECTOR, enabled: false, desc: 0n, driver: 0n, device: 0n };
}

/** 32 bits of a feature word; a select beyond 1 shows none (4.1.4.3.1). */
function featureHalf(features: bigint, select: number): number {
  return select > 1 ? 0 : Number((features >> (32n * BigInt(select))) & 0xffff_ffffn);
}
