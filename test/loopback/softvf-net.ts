import net from "../../plugins/net/index.ts";
import { Deadline } from "../../src/base/deadline.ts";
import type { DeviceClass, SoftOptionValues } from "../../src/plugin.ts";
import { configValues } from "../../src/virtio/config-space.ts";
import { FeatureBit, featureBits } from "../../src/virtio/features.ts";
import { type Reachable, type SoftClass, TestDriver, TestVfs } from "./softvf-driver.ts";

const TIMEOUT = 5000;
/** struct virtio_net_hdr with num_buffers (VIRTIO 1.2, 5.1.6). Bytes. */
const HEADER = 12;
const BUFFER = HEADER + 1514;

export const NetBit = { mtu: 3, mac: 5, mrgRxbuf: 15, status: 16, ctrlVq: 17, ctrlRx: 18, mq: 22 } as const;

/** What the tests negotiate unless they say otherwise. */
const USUAL_FEATURES = featureBits(
  FeatureBit.version1,
  FeatureBit.accessPlatform,
  FeatureBit.ringIndirectDesc,
  FeatureBit.ringEventIdx,
  ...Object.values(NetBit),
);

const classes: DeviceClass[] = [];
net.setup({ deviceClass: (registered) => void classes.push(registered), adoption() {} });
const NET = classes[0] as SoftClass;

export function serveNet(vfs: number, options: SoftOptionValues): Promise<TestVfs> {
  return TestVfs.serveClass(NET, vfs, async () => options);
}

/** A driver of one network card, which takes frames out of its rings one by one. */
export class NetDriver implements AsyncDisposable {
  private constructor(
    readonly driver: TestDriver,
    /** That it has set up, without the control queue. */
    private readonly pairs: number,
  ) {}

  /** Running with all queues of `pairs`, which are all that the device has, and the control queue where it is negotiated. */
  static async start(served: Reachable, pairs = 1, features = USUAL_FEATURES): Promise<NetDriver> {
    const control = (features >> BigInt(NetBit.ctrlVq)) & 1n;
    return new NetDriver(await TestDriver.start(served, 2 * pairs + Number(control), features), pairs);
  }

  /** What the device says of itself. */
  async config() {
    return configValues(NET.configSpace, await this.driver.device.readConfig(24));
  }

  /** Resolves when the frame has been taken. */
  async send(frame: Uint8Array, pair = 0): Promise<void> {
    const sent = this.driver.queues[2 * pair + 1]!.request([new Uint8Array(HEADER), frame], []);
    await Deadline.after(TIMEOUT, "a frame to be sent").race(sent);
  }

  /** Gives the device one buffer. Resolves with the frame that comes into it, whenever that is. */
  async receive(pair = 0): Promise<Uint8Array> {
    const { written, length } = await this.driver.queues[2 * pair]!.request([], [BUFFER]);
    return written[0]!.subarray(HEADER, length);
  }

  /** The same, where one must come. */
  async received(pair = 0): Promise<Uint8Array> {
    return Deadline.after(TIMEOUT, "a frame").race(this.receive(pair));
  }

  /** A command on the control queue. @returns the answer: 0 for yes */
  async command(...bytes: readonly number[]): Promise<number> {
    const asked = this.driver.queues[2 * this.pairs]!.request([Uint8Array.from(bytes)], [1]);
    const { written } = await Deadline.after(TIMEOUT, "a control command").race(asked);
    return written[0]![0]!;
  }

  /** Resolves when the device says that the link is so. It has interrupted then, unless it was so before. */
  async linkIs(up: boolean): Promise<void> {
    await Deadline.after(TIMEOUT, `the link to be ${up ? "up" : "down"}`).poll(async () => {
      return Number((await this.config())["status"]) === (up ? 1 : 0) || undefined;
    }, 1);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.driver[Symbol.asyncDispose]();
  }
}
