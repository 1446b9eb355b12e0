import { Deadline } from "../../src/base/deadline.ts";
import { fileInfo } from "../../src/native/sys.ts";
import { VfioUserFunction } from "../../src/pci/vfio-user/function.ts";
import {
  ADMIN_HEADER,
  AdminClass,
  DirtyPagesCommand,
  type DirtyPagesCommandName,
  InternalStatus,
  type InternalStatusName,
  internalStatusName,
  MigrationCommand,
  type MigrationCommandName,
  MODIFY_STATUS_DATA,
  PENDING_RESULT,
  STATUS_RESULT,
  TRANSFER_DATA,
  VDEV_DATA,
  vdevId,
} from "../../src/virtio/admin/vendor.ts";
import { FeatureBit, featureBits } from "../../src/virtio/features.ts";
import { VirtioPciDevice } from "../../src/virtio/pci-device.ts";
import { DriverQueue } from "../kit/driver-queue.ts";
import { DriverRing } from "../kit/driver-ring.ts";
import { GuestMemoryFile } from "../kit/guest-memory-file.ts";
import type { Reachable } from "./softvf-driver.ts";

const TIMEOUT = 15_000;
const BASE = 0x2_0000_0000;
const RING = 64;
const SPACE = 2 << 20;
const FEATURES = featureBits(FeatureBit.version1, FeatureBit.accessPlatform, FeatureBit.adminVq);

export interface AdminAnswer {
  readonly status: number;
  readonly result: Uint8Array;
}

/** The admin virtqueue of a PF, by hand: whatever bytes a test likes. VFs have their numbers, from 0. */
export class RawAdmin implements AsyncDisposable {
  private constructor(
    readonly fn: VfioUserFunction,
    private readonly memory: GuestMemoryFile,
    private readonly queue: DriverQueue,
  ) {}

  /** @param index of the admin virtqueue, as the PF's class has it */
  static async open(pf: Reachable, index = 0): Promise<RawAdmin> {
    const deadline = Deadline.after(TIMEOUT, "the admin virtqueue");
    const fn = await VfioUserFunction.connect(pf.address, pf.server.path, deadline);
    const device = await VirtioPciDevice.probe(fn, deadline);
    await device.reset(deadline);
    await device.negotiate(FEATURES);
    const memory = new GuestMemoryFile(BASE, DriverRing.span(RING, SPACE));
    const { dev, ino } = fileInfo(memory.file.number);
    const range = { iova: BASE, size: memory.size, offset: 0, file: { dev, ino } };
    await fn.dmaMap(range, memory.file.number, deadline);
    const ring = new DriverRing({ memory, base: BASE, size: RING, features: FEATURES, bufferSpace: SPACE });
    const doorbell = fn.doorbell(4, 0x3000 + 0x1000 * index);
    const queue = new DriverQueue(ring, () => void doorbell.ring(index));
    const vector = index + 1;
    await fn.interrupts.route(vector, queue.call.number);
    const { size, desc, driver, device: used } = ring;
    await device.setUpQueues(0, [{ index, size, vector, desc, driver, device: used, lastAvail: 0, lastUsed: 0 }]);
    await device.run();
    return new RawAdmin(fn, memory, queue);
  }

  /** A chain of these readable buffers with room for a result, and the status in a buffer of its own. */
  async send(readable: readonly Uint8Array[], room = 0): Promise<AdminAnswer> {
    const done = this.queue.request(readable, [...(room === 0 ? [] : [room]), 1]);
    const { written, length } = await Deadline.after(TIMEOUT, "an admin command").race(done);
    const [status = 0xff] = written.at(-1) ?? [];
    if (length !== room + 1) throw new Error(`the answer has ${length} bytes, ${room + 1} were asked for`);
    return { status, result: room === 0 ? new Uint8Array(0) : written[0]! };
  }

  command(name: MigrationCommandName, data: readonly Uint8Array[], room = 0): Promise<AdminAnswer> {
    return this.send([header(AdminClass.migration, MigrationCommand[name]), ...data], room);
  }

  /** A command of class 65. */
  tracking(name: DirtyPagesCommandName, data: Uint8Array, room = 0): Promise<AdminAnswer> {
    return this.send([header(AdminClass.dirtyPages, DirtyPagesCommand[name]), data], room);
  }

  /** @returns the status byte, or the internal status where that is 0 */
  async status(vf: number): Promise<InternalStatusName | number> {
    const data = VDEV_DATA.encode({ vdevId: vdevId(vf) });
    const { status, result } = await this.command("getStatus", [data], STATUS_RESULT.size);
    return status === 0 ? internalStatusName(STATUS_RESULT.read(result).status)! : status;
  }

  /** One step. @returns the status byte */
  async step(vf: number, to: InternalStatusName | number): Promise<number> {
    const status = typeof to === "number" ? to : InternalStatus[to];
    return (await this.command("modifyStatus", [MODIFY_STATUS_DATA.encode({ vdevId: vdevId(vf), status })])).status;
  }

  /** Several steps, all of which must succeed. */
  async steps(vf: number, ...to: readonly InternalStatusName[]): Promise<void> {
    for (const each of to) {
      const status = await this.step(vf, each);
      if (status !== 0) throw new Error(`VF ${vf} did not become ${each}: status 0x${status.toString(16)}`);
    }
  }

  async pending(vf: number): Promise<number> {
    const data = VDEV_DATA.encode({ vdevId: vdevId(vf) });
    const { status, result } = await this.command("pendingBytes", [data], PENDING_RESULT.size);
    if (status !== 0) throw new Error(`the state of VF ${vf} has no size: status 0x${status.toString(16)}`);
    return Number(PENDING_RESULT.read(result).pending);
  }

  savePiece(vf: number, offset: number, length: number): Promise<AdminAnswer> {
    return this.command("save", [transfer(vf, offset, length)], length);
  }

  /** The state, read in pieces of that many bytes. */
  async save(vf: number, piece = 4096): Promise<Uint8Array> {
    const blob = new Uint8Array(await this.pending(vf));
    for (let at = 0; at < blob.length; at += piece) {
      const { status, result } = await this.savePiece(vf, at, Math.min(piece, blob.length - at));
      if (status !== 0) throw new Error(`VF ${vf} was not saved at ${at}: status 0x${status.toString(16)}`);
      blob.set(result, at);
    }
    return blob;
  }

  /** @returns the status byte */
  async restorePiece(vf: number, offset: number, bytes: Uint8Array): Promise<number> {
    return (await this.command("restore", [transfer(vf, offset, bytes.length), bytes])).status;
  }

  /** All pieces, up to the first that is refused. @returns the last status byte */
  async restore(vf: number, blob: Uint8Array, piece = 4096): Promise<number> {
    for (let at = 0; at < blob.length; at += piece) {
      const status = await this.restorePiece(vf, at, blob.subarray(at, at + piece));
      if (status !== 0) return status;
    }
    return 0;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.fn[Symbol.asyncDispose]();
    this.queue[Symbol.dispose]();
    this.memory[Symbol.dispose]();
  }
}

export function header(commandClass: number, command: number): Uint8Array {
  return ADMIN_HEADER.encode({ class: commandClass, command });
}

export function transfer(vf: number, offset: number, length: number): Uint8Array {
  return TRANSFER_DATA.encode({ vdevId: vdevId(vf), offset: BigInt(offset), length: BigInt(length) });
}
