import { afterAll, beforeAll, expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import { MessageSocket } from "../../src/native/message-socket.ts";
import { connectUnix, eventfd, memfd, signalEventfd } from "../../src/native/sys.ts";
import type { Doorbell } from "../../src/pci/function.ts";
import { encodeMessage, vfioUserFraming } from "../../src/vfio-user/framing.ts";
import { Command } from "../../src/vfio-user/messages.ts";
import { encodeVersion, PROTOCOL_VERSION } from "../../src/vfio-user/version.ts";
import { readRequest, SECTOR } from "../kit/blk-requests.ts";
import { rejection } from "../kit/rejection.ts";
import { TestDriver, TestVfs } from "./softvf-driver.ts";

/** Kicks that reach a software VF: waited for by its server, or, as with servers of others, carried by the relay. */

const DOORBELLS = 0x3000;
const BETWEEN_DOORBELLS = 0x1000;
/** Milliseconds in which a notification that nobody should see would have been served. */
const SILENCE = 30;

let vfs: TestVfs;
beforeAll(async () => {
  vfs = await TestVfs.serve(1);
});
afterAll(async () => await vfs[Symbol.asyncDispose]());

/** A running driver whose requests are made available without a word to the device. */
class SilentDriver implements AsyncDisposable {
  private made = 0;

  private constructor(private readonly driver: TestDriver) {}

  static async start(): Promise<SilentDriver> {
    return new SilentDriver(await TestDriver.start(vfs.vf(0), 2));
  }

  doorbell(queue: number): Doorbell & { takeKick: NonNullable<Doorbell["takeKick"]> } {
    return this.at(4, DOORBELLS + queue * BETWEEN_DOORBELLS);
  }

  at(bar: number, offset: number): Doorbell & { takeKick: NonNullable<Doorbell["takeKick"]> } {
    const doorbell = this.driver.fn.doorbell(bar, offset);
    if (doorbell.takeKick === undefined) throw new Error("the server does not take kicks");
    return doorbell as ReturnType<SilentDriver["at"]>;
  }

  makeAvailable(): void {
    const { readable, writable } = readRequest(0, SECTOR);
    this.driver.queues[0]!.ring.submit(readable, writable);
    this.made++;
  }

  /** All that was made available has been served. */
  get done(): boolean {
    const [low = 0, high = 0] = this.driver.memory.read(this.driver.queues[0]!.ring.device + 2, 2);
    return (low | (high << 8)) === this.made;
  }

  async served(): Promise<void> {
    await Deadline.after(5000, "a request that was kicked").poll(() => this.done || undefined, 1);
  }

  /** Everything is served and the worker waits for a notification: until then it looks at the ring unasked. */
  async asleep(): Promise<void> {
    this.makeAvailable();
    await this.doorbell(0).ring(0);
    await this.served();
    await Bun.sleep(SILENCE);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.driver[Symbol.asyncDispose]();
  }
}

test("a kick is waited for by the function itself; one from before counts", async () => {
  await using driver = await SilentDriver.start();
  using kick = eventfd();
  signalEventfd(kick.number);
  driver.makeAvailable();
  await driver.doorbell(0).takeKick(kick.number);
  await driver.served();
  for (let round = 0; round < 50; round++) {
    driver.makeAvailable();
    signalEventfd(kick.number);
    await driver.served();
  }
});

test("another kick replaces the first, and none ends it", async () => {
  await using driver = await SilentDriver.start();
  using first = eventfd();
  using second = eventfd();
  await driver.doorbell(0).takeKick(first.number);
  await driver.doorbell(0).takeKick(second.number);
  await driver.asleep();
  driver.makeAvailable();
  signalEventfd(first.number);
  await Bun.sleep(SILENCE);
  expect(driver.done).toBe(false);
  signalEventfd(second.number);
  await driver.served();

  await driver.doorbell(0).takeKick(null);
  await driver.asleep();
  driver.makeAvailable();
  signalEventfd(second.number);
  await Bun.sleep(SILENCE);
  expect(driver.done).toBe(false);
  await driver.doorbell(0).ring(0);
  await driver.served();
});

test("the relay carries a kick as well", async () => {
  await using driver = await SilentDriver.start();
  using kick = eventfd();
  using _relay = driver.doorbell(0).connect(kick.number, 0);
  for (let round = 0; round < 50; round++) {
    driver.makeAvailable();
    signalEventfd(kick.number);
    await driver.served();
  }
});

test("a client that does not know of it is not told that its kicks would be taken", async () => {
  const offered = async (extensions: { readonly kickFds: number; readonly queueStats: number }) => {
    using socket = new MessageSocket(connectUnix(vfs.vf(0).server.path), vfioUserFraming({ maxBody: 4096, maxFds: 8 }));
    const capabilities = { maxMsgFds: 8, maxDataTransfer: 4096, maxDmaMaps: 8, pageSizes: 4096, ...extensions };
    const version = encodeVersion({ ...PROTOCOL_VERSION, capabilities });
    await socket.send(encodeMessage({ id: 0, command: Command.version, flags: 0 }, version));
    using answer = await Deadline.after(5000, "the version").race(socket.receive());
    return new TextDecoder().decode(answer?.body);
  };
  expect(await offered({ kickFds: 0, queueStats: 0 })).not.toContain("vfe_");
  const both = await offered({ kickFds: 1, queueStats: 1 });
  for (const extension of ["vfe_kick_fds", "vfe_queue_stats"]) expect(both).toContain(`"${extension}":1`);
});

test("what is no eventfd, and what is no doorbell, is refused; the connection and the kick there is go on", async () => {
  await using driver = await SilentDriver.start();
  using kick = eventfd();
  await driver.doorbell(0).takeKick(kick.number);
  using file = memfd("no eventfd", 4096);
  const refused = { errno: 22 };
  expect(await rejection(driver.doorbell(0).takeKick(file.number))).toMatchObject(refused);
  expect(await rejection(driver.at(4, DOORBELLS + 2).takeKick(kick.number))).toMatchObject(refused);
  expect(await rejection(driver.doorbell(4).takeKick(kick.number))).toMatchObject(refused);
  expect(await rejection(driver.at(4, 0).takeKick(kick.number))).toMatchObject(refused);
  expect(await rejection(driver.at(1, 0).takeKick(kick.number))).toMatchObject(refused);
  driver.makeAvailable();
  signalEventfd(kick.number);
  await driver.served();
});

test("a client that hangs up takes its kicks along", async () => {
  using kick = eventfd();
  {
    await using first = await SilentDriver.start();
    await first.doorbell(0).takeKick(kick.number);
    first.makeAvailable();
    signalEventfd(kick.number);
    await first.served();
  }
  await using next = await SilentDriver.start();
  await next.asleep();
  next.makeAvailable();
  signalEventfd(kick.number);
  await Bun.sleep(SILENCE);
  expect(next.done).toBe(false);
  await next.doorbell(0).ring(0);
  await next.served();
});
