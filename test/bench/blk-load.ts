import { open } from "node:fs/promises";
import { eventfd } from "../../src/native/sys.ts";
import { Request } from "../../src/vhost-user/messages.ts";
import { FeatureBit, featureBits } from "../../src/virtio/features.ts";
import { u64, VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { output } from "./native.ts";

const SECONDS = 0.5;
const BLOCK = 4096;
const BLOCKS = 16_384;
const GUEST = 0x1_0000_0000;
const MEMORY = 8 << 20;
const RING = 128;
const FEATURES = featureBits(
  FeatureBit.version1,
  FeatureBit.ringIndirectDesc,
  FeatureBit.ringEventIdx,
  FeatureBit.vhostUserProtocolFeatures,
);

/** A disk for the load generator. Each block begins with its number: it compares. */
export async function makeDisk(path: string): Promise<void> {
  const bytes = new Uint8Array(BLOCKS * BLOCK).fill(0xa5);
  const view = new DataView(bytes.buffer);
  for (let block = 0; block < BLOCKS; block++) view.setBigUint64(block * BLOCK, BigInt(block), true);
  await using file = await open(path, "w");
  await file.writeFile(bytes);
}

export interface BlkResult {
  /** Requests per second. */
  readonly rate: number;
  /** The longest time without a completion, microseconds. */
  readonly longestGap: number;
}

/** A session with one queue of a block device, and the load generator on it: random reads of 4 KiB. */
export class BlkLoad implements Disposable {
  private readonly call = eventfd();

  private constructor(readonly frontend: VhostUserFrontend) {}

  /** @throws Error where the back-end does not offer what is compared */
  static async connect(socket: string): Promise<BlkLoad> {
    const frontend = VhostUserFrontend.connect(socket);
    await frontend.negotiate({ features: FEATURES });
    if (frontend.features !== FEATURES) throw new Error(`${socket} offers other features than those compared`);
    await frontend.setupMemory([{ gpa: GUEST, size: MEMORY }]);
    await frontend.startQueues(1, { size: RING });
    const load = new BlkLoad(frontend);
    // Not the queue's own, which JavaScript waits on.
    await frontend.command(Request.SET_VRING_CALL, u64(0n), [load.call.number]);
    return load;
  }

  /**
   * @param program the load generator's command
   * @param depth requests under way
   */
  async run(program: readonly string[], depth: number, seconds = SECONDS): Promise<BlkResult> {
    const [
      {
        kick,
        driver: { ring },
      },
    ] = this.frontend.queues as [VhostUserFrontend["queues"][number]];
    const [{ file }] = this.frontend.memory.regions as [VhostUserFrontend["memory"]["regions"][number]];
    const { desc, driver, device, arena } = ring;
    const words = [depth, seconds, BLOCKS, RING, GUEST, desc, driver, device, arena.start].map(String);
    const text = await output([...program, ...words], [file.file.number, kick.number, this.call.number]);
    const [rate, longestGap] = text.split(" ").map(Number);
    return { rate: rate!, longestGap: longestGap! };
  }

  [Symbol.dispose](): void {
    this.frontend[Symbol.dispose]();
    this.call[Symbol.dispose]();
  }
}
