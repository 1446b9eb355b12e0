import { closeSync, fstatSync, ftruncateSync, openSync } from "node:fs";
import type { SoftChange, SoftDevice, SoftDeviceClass, SoftOptionValue, SoftOptionValues } from "vfe-vhostd/plugin";
import { CONFIG_SPACE } from "./config-space.ts";
import { Feature } from "./features.ts";

const SECTOR = 512;
/** Of one discard or write-zeroes range: a file that has to be written with zeroes is done with in milliseconds. */
const RANGE_SECTORS_MAX = 32768;
const RANGES_MAX = 16;
const BUFFER_SIZE_MAX = 1 << 20;
/** A request's header and status take two of a chain's buffers. */
const FRAMING_BUFFERS = 2;
/** What the ring worker takes in an indirect table, whatever size the driver gives its ring. */
const CHAIN_MAX = 1024;
const SERIAL_MAX = 20;
const BLOCK_SIZES: readonly number[] = [512, 1024, 2048, 4096];

/** Bytes. */
const CONFIG_SIZE = 60;

/** A disk backed by a raw file. */
export const softDevice: SoftDeviceClass = {
  pciClass: 0x010000,
  options: {
    disk: { type: "path", description: "image file, raw; {vf} in it stands for the number of the VF" },
    size: { type: "size", description: "size of the disk; the file is made that long (shorter only live)", live: true },
    blockSize: { type: "number", description: "bytes of a block: 512, 1024, 2048 or 4096", default: 512 },
    readOnly: { type: "boolean", description: "the disk cannot be written", default: false },
    writeback: {
      type: "boolean",
      description: "the disk has a write cache until the driver says otherwise",
      default: true,
    },
    serial: { type: "string", description: "what GET_ID answers, at most 20 characters", default: "vfe-softvf-{vf}" },
    slow: { type: "number", description: "milliseconds that each request takes at least", default: 0, live: true },
    outOfOrder: { type: "boolean", description: "requests complete in shuffled order", default: false, live: true },
  },
  create: (options) => new BlkSoftDevice(options),
};

/** How many devices of this process have an image open, by device and inode. */
const imageUsers = new Map<string, number>();

class BlkSoftDevice implements SoftDevice {
  readonly features: bigint;
  readonly queues: number;
  readonly worker: SoftDevice["worker"];
  private readonly disk: string;
  private readonly fd: number;
  private readonly image: string;
  private readonly readOnly: boolean;
  private readonly initialWriteback: boolean;
  private readonly bytes = new Uint8Array(CONFIG_SIZE);
  private readonly view = new DataView(this.bytes.buffer);

  constructor(options: SoftOptionValues) {
    const { disk, serial, ringSize } = options;
    const blockSize = options["blockSize"] as number;
    this.readOnly = options["readOnly"] === true;
    this.initialWriteback = options["writeback"] !== false;
    this.queues = options["queues"] as number;
    if (typeof disk !== "string") throw new Error("option disk is missing: name an image file");
    if (!BLOCK_SIZES.includes(blockSize)) {
      throw new Error(`option block-size is ${blockSize}, must be one of ${BLOCK_SIZES.join(", ")}`);
    }
    if (typeof serial !== "string" || new TextEncoder().encode(serial).length > SERIAL_MAX) {
      throw new Error(`option serial is ${JSON.stringify(serial)}, must have at most ${SERIAL_MAX} bytes`);
    }
    const delay = checkDelay(options["slow"]);

    this.features = featuresOf(this.readOnly, this.queues);
    this.disk = disk;
    this.fd = openImage(disk, this.readOnly);
    try {
      const capacity = this.fit(options["size"], blockSize);
      this.writeInitialConfig(capacity, blockSize, ringSize as number);
      this.worker = {
        name: "blk",
        parameters: {
          fd: this.fd,
          capacity,
          readOnly: this.readOnly,
          writeback: this.initialWriteback,
          serial,
          maxRangeSectors: RANGE_SECTORS_MAX,
          maxRanges: RANGES_MAX,
          slow: delay,
          outOfOrder: options["outOfOrder"] === true,
        },
      };
      const { dev, ino } = fstatSync(this.fd, { bigint: true });
      this.image = `${dev}:${ino}`;
      countUser(this.image, 1);
    } catch (error) {
      closeSync(this.fd);
      throw error;
    }
  }

  config(): Uint8Array {
    return this.bytes.slice();
  }

  writeConfig(offset: number, bytes: Uint8Array): SoftChange {
    const at = CONFIG_SPACE.writeback[0] - offset;
    const value = bytes[at];
    if (value === undefined) return {};
    return this.setWriteback(value !== 0);
  }

  reset(): SoftChange {
    return this.setWriteback(this.initialWriteback);
  }

  check(option: string, value: SoftOptionValue): void {
    if (option === "slow") checkDelay(value);
    if (option === "size") this.checkResize(value as number);
  }

  set(option: string, value: SoftOptionValue): SoftChange {
    this.check(option, value);
    switch (option) {
      case "size":
        return this.resize(value as number);
      case "slow":
        return { parameters: { slow: value } };
      case "outOfOrder":
        return { parameters: { outOfOrder: value === true } };
      default:
        throw new Error(`option ${option} cannot be set while the device runs`);
    }
  }

  [Symbol.dispose](): void {
    countUser(this.image, -1);
    closeSync(this.fd);
  }

  private resize(size: number): SoftChange {
    const shorter = size < fstatSync(this.fd).size;
    if (!shorter) lengthen(this.fd, this.disk, size);
    this.view.setBigUint64(CONFIG_SPACE.capacity[0], BigInt(size / SECTOR), true);
    // A shorter file is cut by the worker: between two requests, when no further one reaches behind the new end.
    return { configChanged: true, parameters: shorter ? { cut: size } : { capacity: size } };
  }

  private checkResize(size: number): void {
    if (this.readOnly) throw new Error("a read-only disk cannot be resized");
    checkSizeOption(size, this.view.getUint32(CONFIG_SPACE.blkSize[0], true));
    // Theirs would go on with blocks that are no more, or never learn of the new ones.
    const others = (imageUsers.get(this.image) ?? 1) - 1;
    if (others > 0) {
      const who = others === 1 ? "another VF uses it, too" : `${others} other VFs use it, too`;
      throw new Error(`the image ${this.disk} cannot be resized, ${who}: give each its own ({vf} in --disk)`);
    }
  }

  /** @returns bytes of the disk; the file has at least as many */
  private fit(wanted: SoftOptionValue | undefined, blockSize: number): number {
    const { disk } = this;
    const { size } = fstatSync(this.fd);
    if (wanted === undefined) {
      checkImageSize(disk, size, blockSize);
      return size;
    }
    const target = wanted as number;
    checkSizeOption(target, blockSize);
    if (target === size) return size;
    if (target < size || this.readOnly) {
      throw new Error(
        `option size is ${target}, but ${disk} has ${size} bytes: change the file yourself (truncate -s ${target} ${disk})`,
      );
    }
    lengthen(this.fd, disk, target);
    return target;
  }

  private writeInitialConfig(capacity: number, blockSize: number, ringSize: number): void {
    const { view } = this;
    const at = (field: keyof typeof CONFIG_SPACE) => CONFIG_SPACE[field][0];
    view.setBigUint64(at("capacity"), BigInt(capacity / SECTOR), true);
    view.setUint32(at("sizeMax"), BUFFER_SIZE_MAX, true);
    view.setUint32(at("segMax"), Math.max(1, Math.min(ringSize, CHAIN_MAX) - FRAMING_BUFFERS), true);
    view.setUint32(at("blkSize"), blockSize, true);
    view.setUint16(at("minIoSize"), 1, true);
    view.setUint32(at("optIoSize"), 1, true);
    view.setUint8(at("writeback"), this.initialWriteback ? 1 : 0);
    view.setUint16(at("numQueues"), this.queues, true);
    view.setUint32(at("maxDiscardSectors"), RANGE_SECTORS_MAX, true);
    view.setUint32(at("maxDiscardSeg"), RANGES_MAX, true);
    view.setUint32(at("discardSectorAlignment"), blockSize / SECTOR, true);
    view.setUint32(at("maxWriteZeroesSectors"), RANGE_SECTORS_MAX, true);
    view.setUint32(at("maxWriteZeroesSeg"), RANGES_MAX, true);
    view.setUint8(at("writeZeroesMayUnmap"), 1);
  }

  private setWriteback(on: boolean): SoftChange {
    this.view.setUint8(CONFIG_SPACE.writeback[0], on ? 1 : 0);
    return { parameters: { writeback: on } };
  }
}

function featuresOf(readOnly: boolean, queues: number): bigint {
  const { sizeMax, segMax, ro, blkSize, flush, topology, configWce, mq, discard, writeZeroes } = Feature;
  const bits: number[] = [sizeMax, segMax, blkSize, flush, topology, configWce];
  bits.push(...(readOnly ? [ro] : [discard, writeZeroes]));
  if (queues > 1) bits.push(mq);
  return bits.reduce((word, bit) => word | (1n << BigInt(bit)), 0n);
}

function openImage(disk: string, readOnly: boolean): number {
  let fd: number;
  try {
    fd = openSync(disk, readOnly ? "r" : "r+");
  } catch (cause) {
    const missing = cause instanceof Error && "code" in cause && cause.code === "ENOENT";
    const reason = missing ? `there is none: create it (truncate -s 1G ${disk})` : String(cause);
    throw new Error(`disk image ${disk} cannot be opened, ${reason}`, { cause });
  }
  if (fstatSync(fd).isFile()) return fd;
  closeSync(fd);
  throw new Error(`disk image ${disk} is not a regular file`);
}

/** @throws Error where the file system has no files of that size */
function lengthen(fd: number, disk: string, size: number): void {
  try {
    ftruncateSync(fd, size);
  } catch (cause) {
    throw new Error(`disk image ${disk} cannot be made ${size} bytes long: ${String(cause)}`, { cause });
  }
}

function countUser(image: string, change: 1 | -1): void {
  const users = (imageUsers.get(image) ?? 0) + change;
  if (users === 0) imageUsers.delete(image);
  else imageUsers.set(image, users);
}

function checkSizeOption(size: number, blockSize: number): void {
  if (size > 0 && size % blockSize === 0) return;
  throw new Error(`option size is ${size}, must be a multiple of the block size ${blockSize}, not 0`);
}

function checkImageSize(disk: string, size: number, blockSize: number): void {
  if (size === 0)
    throw new Error(`disk image ${disk} is empty: make it longer (truncate -s 1G ${disk}), or say --size`);
  const whole = Math.ceil(size / blockSize) * blockSize;
  if (size === whole) return;
  throw new Error(
    `disk image ${disk} has ${size} bytes, which are not whole blocks of ${blockSize}: truncate -s ${whole} ${disk}`,
  );
}

function checkDelay(value: SoftOptionValue | undefined): number {
  if (typeof value !== "number" || !Number.isInteger(value) || value < 0 || value > 3_600_000) {
    throw new Error(`option slow is ${value}, must be whole milliseconds from 0 to 3600000`);
  }
  return value;
}
