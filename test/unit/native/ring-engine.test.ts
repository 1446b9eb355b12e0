import { expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { type ForwardedRequest, type RingConfig, RingEngine } from "../../../src/native/ring-engine.ts";
import { drainEventfd, eventfd, memfd, signalEventfd } from "../../../src/native/sys.ts";
import { BlkStatus, blkResult, readRequest, SECTOR, writeRequest } from "../../kit/blk-requests.ts";
import { DriverQueue } from "../../kit/driver-queue.ts";
import { DriverRing } from "../../kit/driver-ring.ts";
import { GuestMemoryFile } from "../../kit/guest-memory-file.ts";
import { rejection } from "../../kit/rejection.ts";
import { eventually, holdFds } from "./open-fds.ts";
import { ringsOf } from "./ring-states.ts";

const GPA = 0x10_0000;
const SIZE = 64;
const FEATURES = (1n << 32n) | (1n << 29n) | (1n << 28n);
/** Both indices begin here and wrap soon. */
const FIRST = 65530;
const DISK = 1 << 20;

holdFds();

/** A driver with one queue, and engines that serve it one after the other. */
class Lab implements Disposable {
  readonly memory = new GuestMemoryFile(GPA, 2 << 20);
  readonly disk = memfd("disk", DISK);
  readonly kick = eventfd();
  readonly queue: DriverQueue;
  readonly requests: ForwardedRequest[] = [];
  readonly failures: string[] = [];
  engine!: RingEngine;

  constructor(readonly worker: "blk" | "forward" = "blk") {
    const ring = new DriverRing({ memory: this.memory, base: GPA, size: SIZE, features: FEATURES, firstIndex: FIRST });
    this.queue = new DriverQueue(ring, () => signalEventfd(this.kick.number));
  }

  config(lastAvail = FIRST, lastUsed = FIRST, inFlight?: readonly number[]): RingConfig {
    const { ring } = this.queue;
    const place = {
      size: SIZE,
      desc: BigInt(ring.desc),
      driver: BigInt(ring.driver),
      device: BigInt(ring.device),
    };
    return { ...place, lastAvail, lastUsed, ...(inFlight === undefined ? {} : { inFlight }) };
  }

  /** An engine in the place of the one before. */
  async create(parameters: Record<string, number | boolean> = {}): Promise<RingEngine> {
    this.engine?.[Symbol.dispose]();
    const blk = { fd: this.disk.number, capacity: DISK, ...parameters };
    const engine = new RingEngine(
      { name: this.worker, parameters: this.worker === "blk" ? blk : {} },
      1,
      (reason) => this.failures.push(reason),
      () => this.requests.push(...engine.takeRequests()),
    );
    this.engine = engine;
    await engine.map(GPA, this.memory.size, this.memory.file.number, 0, true);
    engine.setCall(0, this.queue.call.number);
    engine.setKick(0, this.kick.number);
    return engine;
  }

  async start(config = this.config()): Promise<void> {
    await this.engine.activate(0, config, FEATURES);
    this.engine.start(FEATURES);
  }

  /** The next request that was handed over. */
  async request(): Promise<ForwardedRequest> {
    expect(await eventually(() => this.requests.length > 0)).toBe(true);
    return this.requests.shift()!;
  }

  [Symbol.dispose](): void {
    this.engine?.[Symbol.dispose]();
    this.queue[Symbol.dispose]();
    this.kick[Symbol.dispose]();
    this.disk[Symbol.dispose]();
    this.memory[Symbol.dispose]();
  }
}

function soon(): Deadline {
  return Deadline.after(5000, "the worker");
}

test("requests move from engine to engine with their heads", async () => {
  using lab = new Lab();
  const slow = await lab.create({ slow: 3_600_000, outOfOrder: true });
  await lab.start();
  const contents = Array.from({ length: 9 }, (_, index) => new Uint8Array(SECTOR).fill(index + 1));
  const writes = contents.map((data, sector) => {
    const { readable, writable } = writeRequest(sector, data);
    return lab.queue.request(readable, writable);
  });
  expect(await eventually(() => slow.inFlight() === 9)).toBe(true);
  await slow.park(soon());
  const [state] = await ringsOf(slow);
  // Nine after 65530.
  expect(state).toMatchObject({ queue: 0, lastAvail: 3, lastUsed: FIRST });
  expect(state!.inFlight.length).toBe(9);
  await slow.stop("drop", soon());
  expect([slow.inFlight(), await ringsOf(slow)]).toEqual([0, []]);

  const next = await lab.create();
  await lab.start(lab.config(3, FIRST, state!.inFlight));
  for (const write of writes) expect(blkResult(await write).status).toBe(BlkStatus.ok);
  for (const [sector, data] of contents.entries()) {
    const { readable, writable } = readRequest(sector, SECTOR);
    expect(blkResult(await lab.queue.request(readable, writable))).toEqual({ status: BlkStatus.ok, data });
  }
  expect(next.stats()[0]).toEqual({ received: 18, completed: 18, bad: 0, bytes: 18 * SECTOR });
  expect(await ringsOf(next)).toEqual([{ queue: 0, lastAvail: 12, lastUsed: 12, inFlight: [] }]);
  expect(lab.failures).toEqual([]);
});

test("a quiesced engine takes nothing until it may again, started or not", async () => {
  using lab = new Lab();
  const engine = await lab.create();
  await engine.quiesce();
  await lab.start();
  const { readable, writable } = readRequest(0, SECTOR);
  const read = lab.queue.request(readable, writable);
  await Bun.sleep(5);
  expect(await ringsOf(engine)).toEqual([{ queue: 0, lastAvail: FIRST, lastUsed: FIRST, inFlight: [] }]);
  engine.unquiesce();
  expect(blkResult(await read).status).toBe(BlkStatus.ok);
});

test("heads and kicks are checked", async () => {
  using lab = new Lab();
  const engine = await lab.create();
  const activate = (config: RingConfig) => engine.activate(0, config, FEATURES);
  expect((await rejection(activate(lab.config(2, 0, [SIZE])))).message).toContain(
    "head in flight 64 is outside the ring of 64",
  );
  expect((await rejection(activate(lab.config(2, 0, [5, 5])))).message).toContain("head 5 is in flight twice");
  expect((await rejection(activate(lab.config(2, 0, [1, 2, 3])))).message).toContain(
    "3 chains are in flight, by the indices 2",
  );
  expect((await rejection(activate(lab.config(0, 1)))).message).toContain("65535 ahead of used index 1");
  expect((await rejection(activate(lab.config(2, 0, [65536])))).message).toContain("head in flight is 65536");
  await activate(lab.config());
  expect((await rejection(activate(lab.config()))).message).toContain("queue 0 is active");
  expect(() => engine.setKick(1, null)).toThrow("queue is 1");
  expect(() => engine.setKick(0, lab.disk.number)).toThrow("EPERM");
  engine.setKick(0, null);
  expect(drainEventfd(lab.kick.number)).toBe(0);
});

test("JavaScript serves what is forwarded, in its own order", async () => {
  using lab = new Lab("forward");
  const engine = await lab.create();
  await lab.start();
  const first = lab.queue.request([Uint8Array.of(1, 2), Uint8Array.of(3)], [4, 4]);
  const one = await lab.request();
  expect(one).toMatchObject({ queue: 0, readable: Uint8Array.of(1, 2, 3), writable: 8 });
  const second = lab.queue.request([], [2]);
  const two = await lab.request();
  expect(two).toMatchObject({ queue: 0, readable: new Uint8Array(0), writable: 2 });
  expect(engine.inFlight()).toBe(2);
  engine.answer(two.id, Uint8Array.of(9, 9, 9));
  expect(await second).toMatchObject({ length: 2, written: [Uint8Array.of(9, 9)] });
  engine.answer(one.id, Uint8Array.of(1, 2, 3, 4, 5));
  expect(await first).toMatchObject({ length: 5, written: [Uint8Array.of(1, 2, 3, 4), Uint8Array.of(5, 0, 0, 0)] });
  engine.answer(one.id, Uint8Array.of(6));
  engine.answer(999, Uint8Array.of(6));
  expect([engine.inFlight(), lab.failures]).toEqual([0, []]);
});

test("a request that was never answered holds up neither stop nor the end, and its answer comes too late", async () => {
  using lab = new Lab("forward");
  for (const how of ["finish", "drop"] as const) {
    const engine = await lab.create();
    await lab.start(lab.config(...positions(lab)));
    const request = lab.queue.request([Uint8Array.of(7)], [1]);
    const { id } = await lab.request();
    const { inFlight } = (await ringsOf(engine))[0]!;
    expect(inFlight.length).toBe(1);
    const [indices] = await engine.stop(how, soon());
    expect(indices!.lastAvail).toBe((indices!.lastUsed + 1) & 0xffff);
    engine.answer(id, Uint8Array.of(1));
    // Served again from the start.
    await lab.start(lab.config(indices!.lastAvail, indices!.lastUsed, inFlight));
    const again = await lab.request();
    expect(again.id).not.toBe(id);
    engine.answer(again.id, Uint8Array.of(2));
    expect(await request).toMatchObject({ head: inFlight[0]!, written: [Uint8Array.of(2)] });
  }
  lab.queue.ring.submit([Uint8Array.of(7)], [1]);
  signalEventfd(lab.kick.number);
  await lab.request();
});

test("what is too big to be forwarded fails the function", async () => {
  using lab = new Lab("forward");
  await lab.create();
  await lab.start();
  const buffer = { address: lab.queue.ring.arena.take(16), length: (1 << 20) + 1, flags: 2 };
  lab.queue.ring.submitRaw([buffer]);
  signalEventfd(lab.kick.number);
  expect(await eventually(() => lab.failures.length > 0)).toBe(true);
  expect(lab.failures[0]).toContain("1048577 bytes, at most 1048576");
  expect(lab.requests).toEqual([]);
});

/** Where the ring's driver stands, nothing being in flight. */
function positions(lab: Lab): [number, number] {
  const { memory, queue } = lab;
  const [low, high] = memory.read(queue.ring.driver + 2, 2);
  const index = low! | (high! << 8);
  return [index, index];
}
