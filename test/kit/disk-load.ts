import { Deadline } from "../../src/base/deadline.ts";
import { FeatureBit, featureBits } from "../../src/virtio/features.ts";
import { DescriptorFlag } from "../../src/virtio/split-ring.ts";
import { BlkStatus, BlkType, header, SECTOR } from "./blk-requests.ts";
import type { VhostUserFrontend } from "./frontend/frontend.ts";
import type { DriverMemory } from "./guest-memory-file.ts";
import { PreparedQueue, type Returned } from "./prepared-queue.ts";

/** Bytes. */
const BLOCK = 4096;
const HEADER = 16;
const RING = 256;
/** Requests under way on a queue, and the blocks of the disk that one of them works on. */
const LANES = 48;
const BLOCKS_PER_LANE = 16;
/** Bytes of guest memory for each queue. */
const SPACE = 1 << 20;
const NOISE = crypto.getRandomValues(new Uint8Array(64 << 10));

/** What a driver must not have for a DiskLoad to work. */
export const PLAIN_RINGS = ~featureBits(FeatureBit.ringEventIdx, FeatureBit.ringIndirectDesc);

/** One request at a time, in buffers that are its own, on blocks that are its own. */
interface Lane {
  /** Of its buffers: the header, and the data behind it. */
  readonly address: number;
  /** Chains. */
  readonly read: number;
  readonly write: number;
  readonly firstBlock: number;
  /** What is under way. */
  block: number;
  writing: boolean;
}

/**
 * Writes and reads of random blocks, each of which has its own content each time, on all queues of a disk; what is read is
 * compared. For very many requests: three system calls each.
 */
export class DiskLoad implements Disposable {
  readonly queues: PreparedQueue[] = [];
  private readonly disks: QueueLoad[] = [];

  /** Starts the queues of a front-end that has memory, in its last region, and without the features that PLAIN_RINGS hides. */
  static async start(frontend: VhostUserFrontend, queues: number): Promise<DiskLoad> {
    const load = new DiskLoad();
    const region = frontend.memory.regions.at(-1);
    if (region === undefined) throw new Error("rings need memory: call setupMemory first");
    for (let index = 0; index < queues; index++) {
      const disk = new QueueLoad(index, frontend.memory, region.file.gpa + index * SPACE);
      load.disks.push(disk);
      load.queues.push(disk.queue);
    }
    await frontend.startRings(load.queues);
    return load;
  }

  /** Requests that were answered rightly. */
  get verified(): number {
    return this.disks.reduce((sum, { verified }) => sum + verified, 0);
  }

  /**
   * So many requests more, and one for each block at the end that compares what is on the disk.
   * @param timeout milliseconds
   * @throws what went wrong; VhostdError timedOut
   */
  async run(requests: number, timeout: number): Promise<void> {
    const each = Math.ceil(requests / this.disks.length);
    const deadline = Deadline.after(timeout, `${requests} requests`);
    await this.round(deadline, (disk) => disk.begin(each));
    await this.round(deadline, (disk) => disk.beginReadingAll());
  }

  [Symbol.dispose](): void {
    for (const queue of this.queues) queue[Symbol.dispose]();
  }

  private async round(deadline: Deadline, begin: (disk: QueueLoad) => void): Promise<void> {
    for (const disk of this.disks) begin(disk);
    await deadline.poll(() => {
      const failure = this.queues.find((queue) => queue.failure !== undefined)?.failure;
      if (failure !== undefined) throw failure;
      return this.disks.every(({ busy }) => !busy) || undefined;
    }, 5);
  }
}

/** The load of one queue, which has a part of the disk to itself. */
class QueueLoad {
  readonly queue: PreparedQueue;
  verified = 0;
  private readonly lanes: Lane[] = [];
  private readonly laneOf = new Map<number, Lane>();
  /** How often each block was written. */
  private readonly written = new Uint32Array(LANES * BLOCKS_PER_LANE);
  private left = 0;
  private underWay = 0;
  /** All that was written is read, and nothing else. */
  private reading = false;

  constructor(
    private readonly index: number,
    private readonly memory: DriverMemory,
    base: number,
  ) {
    this.queue = new PreparedQueue(index, memory, base, RING, (returned) => this.take(returned));
    for (let lane = 0; lane < LANES; lane++) this.prepare(lane);
  }

  get busy(): boolean {
    return this.underWay > 0;
  }

  begin(requests: number): void {
    this.left = requests;
    this.reading = false;
    this.publish(this.lanes);
  }

  beginReadingAll(): void {
    this.reading = true;
    for (const lane of this.lanes) lane.block = lane.firstBlock - 1;
    this.publish(this.lanes);
  }

  /** The status bytes of all lanes lie together behind the ring. */
  private get statuses(): number {
    return this.queue.end;
  }

  private prepare(number: number): void {
    const address = this.statuses + BLOCK + number * 2 * BLOCK;
    const { write } = DescriptorFlag;
    const status = { address: this.statuses + number, length: 1, flags: write };
    const head = { address, length: HEADER, flags: 0 };
    const firstBlock = number * BLOCKS_PER_LANE;
    const lane = {
      address,
      read: this.queue.chain([head, { address: address + HEADER, length: BLOCK, flags: write }, status]),
      write: this.queue.chain([{ ...head, length: HEADER + BLOCK }, status]),
      firstBlock,
      block: firstBlock,
      writing: false,
    };
    this.lanes.push(lane);
    this.laneOf.set(lane.read, lane).set(lane.write, lane);
  }

  /** The next request of each lane that has one. */
  private publish(lanes: readonly Lane[]): void {
    const heads = lanes.map((lane) => this.next(lane)).filter((head) => head !== undefined);
    this.underWay += heads.length;
    this.queue.publish(heads);
  }

  private next(lane: Lane): number | undefined {
    const end = lane.firstBlock + BLOCKS_PER_LANE;
    if (this.reading) {
      do lane.block++;
      while (lane.block < end && this.written[lane.block] === 0);
      return lane.block < end ? this.read(lane) : undefined;
    }
    if (this.left === 0) return undefined;
    this.left--;
    lane.block = lane.firstBlock + Math.floor(Math.random() * BLOCKS_PER_LANE);
    return this.written[lane.block] === 0 || Math.random() < 0.5 ? this.write(lane) : this.read(lane);
  }

  private write(lane: Lane): number {
    this.written[lane.block]!++;
    lane.writing = true;
    this.memory.write(lane.address, Buffer.concat([this.header(lane, BlkType.out), this.content(lane)]));
    return lane.write;
  }

  private read(lane: Lane): number {
    lane.writing = false;
    this.memory.write(lane.address, this.header(lane, BlkType.in));
    return lane.read;
  }

  private take(returned: readonly Returned[]): void {
    const statuses = this.memory.read(this.statuses, LANES);
    const lanes = returned.map(({ head, length }) => {
      const lane = this.laneOf.get(head);
      if (lane === undefined) throw new Error(`the device gave back ${head}, which is no chain`);
      this.check(lane, statuses[lane.firstBlock / BLOCKS_PER_LANE]!, length);
      return lane;
    });
    this.underWay -= lanes.length;
    this.verified += lanes.length;
    this.publish(lanes);
  }

  private check(lane: Lane, status: number, length: number): void {
    const { block, writing, address } = lane;
    const what = `${writing ? "write" : "read"} of block ${block} on queue ${this.index}`;
    if (status !== BlkStatus.ok) throw new Error(`${what}: status ${status}`);
    const expected = writing ? 1 : BLOCK + 1;
    if (length !== expected) throw new Error(`${what}: ${length} bytes written, must be ${expected}`);
    if (writing || this.content(lane).equals(this.memory.read(address + HEADER, BLOCK))) return;
    throw new Error(`${what}: it came back different`);
  }

  private header({ block }: Lane, type: number): Uint8Array {
    const first = this.index * LANES * BLOCKS_PER_LANE;
    return header(type, ((first + block) * BLOCK) / SECTOR);
  }

  /** What the block holds since it was written last. */
  private content({ block }: Lane): Buffer {
    const version = this.written[block]!;
    const content = Buffer.allocUnsafe(BLOCK);
    content.set(NOISE.subarray((Math.imul(version, 7919) + block) % (NOISE.length - BLOCK)).subarray(0, BLOCK));
    content.writeUInt32LE(this.index, 0);
    content.writeUInt32LE(block, 4);
    content.writeUInt32LE(version, 8);
    return content;
  }
}
