import { FeatureBit, featureBits } from "../../src/virtio/features.ts";
import { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { output } from "./native.ts";

const SECONDS = "0.5";
const GUEST = 0x1_0000_0000;
const MEMORY = 8 << 20;
const RING = 256;
/** Of each buffer. */
const BUFFER = 2048;
/** Under way at once. */
const FRAMES = 64;
/** Bytes, with its header. */
const FRAME = 12 + 1500;
const FEATURES = featureBits(FeatureBit.version1, FeatureBit.vhostUserProtocolFeatures);

/** A session with both queues of a network device whose frames come back, and the load generator on it. */
export class NetLoad implements Disposable {
  private constructor(readonly frontend: VhostUserFrontend) {}

  static async connect(socket: string): Promise<NetLoad> {
    const frontend = VhostUserFrontend.connect(socket);
    await frontend.negotiate({ features: FEATURES });
    await frontend.setupMemory([{ gpa: GUEST, size: MEMORY }]);
    await frontend.startQueues(2, { size: RING, bufferSpace: RING * BUFFER });
    return new NetLoad(frontend);
  }

  /** @param program the load generator's command @returns frames per second that came back */
  async run(program: readonly string[]): Promise<number> {
    const { queues, memory } = this.frontend;
    const places = queues.flatMap(({ driver: { ring } }) => [ring.desc, ring.driver, ring.device]);
    const buffers = Math.ceil(Math.max(...queues.map(({ driver: { ring } }) => ring.arena.start)) / BUFFER) * BUFFER;
    const words = [FRAMES, FRAME, SECONDS, RING, GUEST, ...places, buffers + RING * BUFFER].map(String);
    const fds = [memory.regions[0]!.file.file, ...queues.map(({ kick }) => kick)].map(({ number }) => number);
    return Number(await output([...program, ...words], fds));
  }

  [Symbol.dispose](): void {
    this.frontend[Symbol.dispose]();
  }
}
