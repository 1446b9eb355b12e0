import { expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { RingEngine, type RingParameters } from "../../../src/native/ring-engine.ts";
import { DriverQueue } from "../../kit/driver-queue.ts";
import type { Completed } from "../../kit/driver-ring.ts";
import { DriverRing } from "../../kit/driver-ring.ts";
import { GuestMemoryFile } from "../../kit/guest-memory-file.ts";
import { eventually, holdFds } from "./open-fds.ts";
import { ringsOf } from "./ring-states.ts";

const GPA = 0x10_0000;
const SIZE = 32;
const SPAN = 0x8_0000;
const bits = (...list: number[]) => list.reduce((word, bit) => word | (1n << BigInt(bit)), 0n);
const Bit = { csum: 0, guestCsum: 1, mtu: 3, guestTso4: 7, hostTso4: 11, mrgRxbuf: 15, ctrlVq: 17, ctrlRx: 18, mq: 22 };
const CORE = bits(32, 29, 28);
const HEADER = 12;
const OWN = [2, 0, 0, 0, 0, 1];
const OTHER = [2, 0, 0, 0, 0, 2];
const GROUP = [1, 0, 0x5e, 0, 0, 1];

let wires = 0;

holdFds();

/** A network device of so many pairs, and the driver's side of its queues. */
class Nic implements Disposable {
  readonly engine: RingEngine;
  readonly queues: DriverQueue[];
  readonly failures: string[] = [];
  readonly carriers: boolean[] = [];
  private readonly memory: GuestMemoryFile;

  constructor(
    parameters: RingParameters,
    readonly features = CORE,
    readonly pairs = 1,
  ) {
    const count = 2 * pairs + 1;
    this.memory = new GuestMemoryFile(GPA, count * SPAN);
    this.engine = new RingEngine(
      { name: "net", parameters: { pairs, mac: "02:00:00:00:00:01", ...parameters } },
      count,
      (reason) => this.failures.push(reason),
      undefined,
      (up) => this.carriers.push(up),
    );
    this.queues = Array.from({ length: count }, (_, index) => {
      const base = GPA + index * SPAN;
      const ring = new DriverRing({ memory: this.memory, base, size: SIZE, features, bufferSpace: SPAN - 0x4000 });
      return new DriverQueue(ring, () => this.engine.notify(index));
    });
  }

  async start(skip: readonly number[] = []): Promise<void> {
    await this.engine.map(GPA, this.memory.size, this.memory.file.number, 0, true);
    for (const [index, { ring, call }] of this.queues.entries()) {
      if (skip.includes(index)) continue;
      const { desc, driver, device } = ring;
      const place = { desc: BigInt(desc), driver: BigInt(driver), device: BigInt(device) };
      await this.engine.activate(index, { size: SIZE, ...place, lastAvail: 0, lastUsed: 0 }, this.features);
      this.engine.setCall(index, call.number);
    }
    this.engine.start(this.features);
  }

  /** What the next frame on the pair will be put into. */
  receive(pair = 0, sizes: readonly number[] = [HEADER + 1600]): Promise<Completed> {
    return this.queues[2 * pair]!.request([], sizes);
  }

  send(bytes: Uint8Array, pair = 0): Promise<Completed> {
    return this.queues[2 * pair + 1]!.request([bytes], []);
  }

  /** @returns the answer to a command */
  async command(...bytes: number[]): Promise<number> {
    const { written } = await this.queues.at(-1)!.request([Uint8Array.of(...bytes)], [1]);
    return written[0]![0]!;
  }

  /** Chains that the device has taken of a queue. */
  async taken(queue: number): Promise<number> {
    return (await ringsOf(this.engine)).find((ring) => ring.queue === queue)!.lastAvail;
  }

  [Symbol.dispose](): void {
    this.engine[Symbol.dispose]();
    for (const queue of this.queues) queue[Symbol.dispose]();
    this.memory[Symbol.dispose]();
  }
}

/** A frame with its header. */
function frame(to: readonly number[], length = 60, header: readonly number[] = []): Uint8Array {
  const bytes = new Uint8Array(HEADER + length).map((_, index) => index & 0xff);
  bytes.fill(0, 0, HEADER);
  bytes.set(header);
  bytes.set([...to, ...OTHER, 0x88, 0xb5], HEADER);
  return bytes;
}

function bytesOf({ length, written }: Completed): Uint8Array {
  return Buffer.concat(written).subarray(0, length);
}

/** As received: one buffer. */
function received(sent: Uint8Array, buffers = 1): Uint8Array {
  const bytes = sent.slice();
  bytes.set([buffers, 0], HEADER - 2);
  return bytes;
}

function onWire(features?: bigint, pairs?: number): [Nic, Nic] {
  const wire = `wire ${wires++}`;
  return [new Nic({ backend: "wire", wire }, features, pairs), new Nic({ backend: "wire", wire }, features, pairs)];
}

const soon = () => Deadline.after(5000, "the worker");

test("echo sends a frame back with its addresses swapped", async () => {
  using nic = new Nic({ backend: "echo" });
  expect(nic.engine.carrier()).toBe(true);
  await nic.start();
  const back = nic.receive();
  await nic.send(frame(OWN, 1514));
  const expected = received(frame(OTHER, 1514));
  expected.set([...OTHER, ...OWN], HEADER);
  expect(bytesOf(await back)).toEqual(expected);
  expect(nic.engine.stats().slice(0, 2)).toEqual([
    { received: 1, completed: 1, bad: 0, bytes: 1514 },
    { received: 1, completed: 1, bad: 0, bytes: 1514 },
  ]);
  expect(nic.failures).toEqual([]);
});

test("a wire carries frames both ways, in order, and knows when the other end is up", async () => {
  const [left, right] = onWire();
  using _ = left;
  {
    using __ = right;
    expect(left.engine.carrier()).toBe(false);
    await left.start();
    await left.send(frame(OWN));
    expect(left.engine.info()["dropped"]).toBe(1);
    await right.start();
    expect(await eventually(() => left.engine.carrier() && right.engine.carrier())).toBe(true);
    expect(left.carriers).toEqual([true]);
    for (let round = 0; round < 40; round++) {
      for (const [from, to] of [
        [left, right],
        [right, left],
      ] as const) {
        const lengths = [60, 61 + round, 1514];
        const arrivals = lengths.map(() => to.receive());
        for (const length of lengths) await from.send(frame(OWN, length));
        for (const [index, length] of lengths.entries()) {
          expect(bytesOf(await arrivals[index]!)).toEqual(received(frame(OWN, length)));
        }
      }
    }
    const parameters = { backend: "wire", wire: `wire ${wires - 1}`, pairs: 1 };
    expect(() => new RingEngine({ name: "net", parameters }, 3, () => {})).toThrow("has two ends already");
  }
  expect(await eventually(() => !left.engine.carrier())).toBe(true);
  expect(left.carriers).toEqual([true, false]);
  await left.send(frame(OWN));
  expect(left.engine.info()["dropped"]).toBe(2);
});

test("a frame is merged from the chains that it needs, and waits for them without holding any", async () => {
  const [left, right] = onWire(CORE | bits(Bit.mrgRxbuf));
  using _ = left;
  using __ = right;
  await Promise.all([left.start(), right.start()]);
  await eventually(() => left.engine.carrier());
  await left.send(frame(OWN, 100));
  await Bun.sleep(2);
  expect(await right.taken(0)).toBe(0);
  expect(bytesOf(await right.receive())).toEqual(received(frame(OWN, 100)));

  const arrivals = [64, 100, 2000].map((size) => right.receive(0, [size]));
  await left.send(frame(OWN, 300));
  const parts = await Promise.all(arrivals);
  expect(parts.map(({ length }) => length)).toEqual([64, 100, 148]);
  expect(Buffer.concat(parts.map(bytesOf))).toEqual(Buffer.from(received(frame(OWN, 300), 3)));
  expect(right.engine.stats()[0]).toEqual({ received: 4, completed: 4, bad: 0, bytes: 400 });

  // One that never fits goes, the next one comes.
  const small = right.receive(0, [200]);
  await left.send(frame(OWN, 300));
  expect(await eventually(() => right.engine.info()["dropped"] === 1)).toBe(true);
  expect([await right.taken(0), right.engine.inFlight()]).toEqual([4, 0]);
  await left.send(frame(OWN, 90));
  expect(bytesOf(await small)).toEqual(received(frame(OWN, 90)));
});

test("a frame too long for the next chain is dropped, and so is what exceeds the MTU; bad chains are given back", async () => {
  using nic = new Nic({ backend: "echo", mtu: 1000 }, CORE | bits(Bit.mtu));
  await nic.start();
  const tooShort = nic.receive(0, [8]);
  const next = nic.receive(0, [HEADER + 100]);
  await nic.send(frame(OWN, 200));
  await nic.send(frame(OWN, 1100));
  expect(await tooShort).toMatchObject({ length: 0 });
  expect(await eventually(() => nic.engine.info()["dropped"] === 2)).toBe(true);
  await nic.send(frame(OWN, 100));
  expect((await next).length).toBe(HEADER + 100);
  expect(nic.engine.stats()[0]).toEqual({ received: 2, completed: 2, bad: 1, bytes: 100 });

  await nic.send(new Uint8Array(HEADER - 1));
  await nic.send(new Uint8Array(HEADER + 13));
  await nic.send(new Uint8Array(70_000));
  // Segmentation and a partial checksum that were not negotiated.
  await nic.send(frame(OWN, 100, [1, 0]));
  await nic.send(frame(OWN, 100, [1, 1, 0, 0, 100]));
  expect(nic.engine.stats()[1]).toEqual({ received: 8, completed: 8, bad: 5, bytes: 1400 });
  expect(nic.failures).toEqual([]);
});

test("a partial checksum is completed for a driver that does not know of it", async () => {
  const wire = `wire ${wires++}`;
  using left = new Nic({ backend: "wire", wire }, CORE | bits(Bit.csum, Bit.hostTso4));
  using right = new Nic({ backend: "wire", wire });
  await Promise.all([left.start(), right.start()]);
  await eventually(() => left.engine.carrier());
  const partial = frame(OWN, 60, [1, 0, 0, 0, 0, 0, 20, 0, 6, 0]);
  const segments = frame(OWN, 60, [1, 1, 0, 0, 10, 0, 20, 0, 6, 0]);
  await left.send(segments);
  await left.send(partial);
  const bytes = bytesOf(await right.receive());
  expect(bytes[0]).toBe(0);
  let sum = 0;
  // What was the pseudo header's sum is part of the sum once: the checksum makes it whole again.
  const data = bytes.slice(HEADER + 20);
  const pseudo = partial.slice(HEADER + 26, HEADER + 28);
  for (let at = 0; at < data.length; at += 2) sum += (data[at]! << 8) | data[at + 1]!;
  sum += (pseudo[0]! << 8) | pseudo[1]!;
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >> 16);
  expect(sum).toBe(0xffff);
  expect(right.engine.info()["dropped"]).toBe(1);
});

test("only what is for the driver passes, unless it wants all", async () => {
  using nic = new Nic({ backend: "wire", wire: `wire ${wires}` }, CORE | bits(Bit.ctrlVq, Bit.ctrlRx));
  using peer = new Nic({ backend: "wire", wire: `wire ${wires++}` });
  await Promise.all([nic.start(), peer.start()]);
  await eventually(() => peer.engine.carrier());
  await peer.send(frame(OTHER));
  await peer.send(frame(GROUP));
  await peer.send(frame(OWN, 61));
  expect(bytesOf(await nic.receive())).toEqual(received(frame(GROUP)));
  expect(bytesOf(await nic.receive())).toEqual(received(frame(OWN, 61)));
  expect(nic.engine.info()).toMatchObject({ promiscuous: 0, dropped: 0 });
  expect(await nic.queues[2]!.request([Uint8Array.of(0, 0, 1)], [1])).toMatchObject({ written: [Uint8Array.of(0)] });
  expect(nic.engine.info()).toMatchObject({ promiscuous: 1 });
  await peer.send(frame(OTHER));
  expect(bytesOf(await nic.receive())).toEqual(received(frame(OTHER)));
  await nic.engine.configure({ promiscuous: false, mac: "02:00:00:00:00:02" });
  await peer.send(frame(OWN));
  await peer.send(frame(OTHER));
  expect(bytesOf(await nic.receive())).toEqual(received(frame(OTHER)));
});

test("as many pairs receive as the driver says", async () => {
  const features = CORE | bits(Bit.ctrlVq, Bit.mq);
  const [left, right] = onWire(features, 4);
  using _ = left;
  using __ = right;
  await Promise.all([left.start(), right.start()]);
  await eventually(() => left.engine.carrier());
  await left.engine.configure({ pairsInUse: 4 });
  const arrive = async (from: number): Promise<number> => {
    const before = right.engine.stats();
    await left.send(frame(OWN), from);
    const moved = () => right.engine.stats().findIndex(({ completed }, index) => completed > before[index]!.completed);
    expect(await eventually(() => moved() >= 0)).toBe(true);
    return moved() / 2;
  };
  for (let pair = 0; pair < 4; pair++) for (let count = 0; count < 4; count++) void right.receive(pair).catch(() => {});
  const pairs = async () => [await arrive(0), await arrive(1), await arrive(2), await arrive(3)];
  expect(await pairs()).toEqual([0, 0, 0, 0]);
  expect(await right.command(4, 0, 3, 0)).toBe(0);
  expect(right.engine.info()).toMatchObject({ pairsInUse: 3 });
  for (let count = 0; count < 4; count++) void right.receive(0).catch(() => {});
  expect(await pairs()).toEqual([0, 1, 2, 0]);
  const refused = [[4, 0, 5, 0], [4, 0, 0, 0], [4, 0, 1], [4, 1, 1, 0], [0, 0, 1], [1, 1, 1, 2], []];
  for (const bytes of refused) expect(await right.command(...bytes)).toBe(1);
  expect(right.engine.info()).toMatchObject({ pairsInUse: 3 });
  await right.engine.configure({ pairsInUse: 0 });
  expect(await pairs()).toEqual([0, 1, 2, 3]);
  expect([left.failures, right.failures]).toEqual([[], []]);
});

test("a state that does not say how many pairs are in use goes on with those that are set up", async () => {
  const features = CORE | bits(Bit.ctrlVq, Bit.mq);
  const wire = `wire ${wires++}`;
  using left = new Nic({ backend: "wire", wire });
  using right = new Nic({ backend: "wire", wire, pairsInUse: 0 }, features, 3);
  await Promise.all([left.start(), right.start([0, 1, 3])]);
  await eventually(() => left.engine.carrier());
  await left.send(frame(OWN));
  expect((await right.receive(2)).length).toBe(HEADER + 60);
});

test("a quiesced or parked engine takes no receive chain and goes on with the frames that came", async () => {
  const [left, right] = onWire();
  using _ = left;
  using __ = right;
  await Promise.all([left.start(), right.start()]);
  await eventually(() => left.engine.carrier());
  const arrivals = [right.receive(), right.receive(), right.receive()];
  await left.send(frame(OWN, 61));
  await arrivals[0];
  await right.engine.quiesce();
  await left.send(frame(OWN, 62));
  await Bun.sleep(3);
  expect([await right.taken(0), right.engine.inFlight()]).toEqual([1, 0]);
  right.engine.unquiesce();
  expect((await arrivals[1]!).length).toBe(HEADER + 62);
  await right.engine.park(soon());
  await left.send(frame(OWN, 63));
  await Bun.sleep(3);
  expect(right.engine.rings()[0]).toEqual({ queue: 0, lastAvail: 2, lastUsed: 2, inFlight: [] });
  right.engine.start(right.features);
  expect((await arrivals[2]!).length).toBe(HEADER + 63);
  expect(left.carriers).toEqual([true]);

  // The cable is pulled.
  await right.engine.configure({ link: false });
  expect(await eventually(() => !left.engine.carrier())).toBe(true);
  expect(right.engine.carrier()).toBe(true);
  await right.engine.configure({ link: true });
  expect(await eventually(() => left.engine.carrier())).toBe(true);
  await right.engine.stop("finish", soon());
  expect(await eventually(() => !left.engine.carrier())).toBe(true);
});

test("parameters are checked", () => {
  const create = (parameters: RingParameters) => () => {
    new RingEngine({ name: "net", parameters }, 3, () => {})[Symbol.dispose]();
  };
  expect(create({ pairs: 1 })).toThrow("needs the parameter backend");
  expect(create({ pairs: 1, backend: "tap" })).toThrow("needs the parameter tap");
  expect(create({ pairs: 1, backend: "veth" })).toThrow('parameter backend: "veth" is none of tap, wire, echo');
  expect(create({ pairs: 0, backend: "echo" })).toThrow("parameter pairs: is 0, must be from 1 to 256");
  expect(create({ pairs: 1, backend: "echo", mac: "2:0:0:0:0:1" })).toThrow("is no MAC address");
  expect(create({ pairs: 1, backend: "tap", tap: "a-name-that-is-too-long" })).toThrow("has 23 characters");
  expect(create({ pairs: 1, backend: "tap", tap: "lo" })).toThrow("the TAP interface lo cannot be opened");
});
