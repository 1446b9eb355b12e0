import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { mkdtemp, rm, truncate, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { duplicate, liveFds, type OwnedFd } from "../../src/native/fd.ts";
import { eventfd, fileInfo, signalEventfd } from "../../src/native/sys.ts";
import { parsePciAddress } from "../../src/pci/address.ts";
import { Bus, type BusEntry } from "../../src/pci/bus.ts";
import { DmaDomain } from "../../src/pci/dma-domain.ts";
import type { PciFunction } from "../../src/pci/function.ts";
import { VfioUserAddressSpace } from "../../src/pci/vfio-user/address-space.ts";
import type { VfioUserFunction } from "../../src/pci/vfio-user/function.ts";
import { DataPath } from "../../src/virtio/data-path.ts";
import type { DeviceState } from "../../src/virtio/device-state.ts";
import { BlkStatus, blkResult, readRequest, SECTOR, writeRequest } from "../kit/blk-requests.ts";
import { DriverQueue } from "../kit/driver-queue.ts";
import { DriverRing } from "../kit/driver-ring.ts";
import { fakeClass } from "../kit/fake-class.ts";
import { GuestMemoryFile } from "../kit/guest-memory-file.ts";
import { rejection } from "../kit/rejection.ts";

const VF = parsePciAddress("5a:00.1");
const GUEST = 0x1_0000_0000;
const MEMORY = 8 << 20;
const RING = 64;
const soon = (what: string) => Deadline.after(5000, what);

let directory = "";
let softvf: Bun.Subprocess<"ignore", "pipe", "inherit">;
let entry: BusEntry;
const undo: (() => void | Promise<void>)[] = [];

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), "softvf-"));
  const disk = join(directory, "disk.img");
  await writeFile(disk, "");
  await truncate(disk, 4 << 20);
  const program = join(import.meta.dir, "../../bin/vfe-softvf.ts");
  const args = ["--pf", "5a:00.0", "--class", "blk", "--queues", "2", "--disk", disk, "--runtime-dir", directory];
  softvf = Bun.spawn([process.execPath, program, ...args, "--log-level", "warn"], {
    stdin: "ignore",
    stdout: "pipe",
    stderr: "inherit",
  });
  const reader = softvf.stdout.getReader();
  await soon("vfe-softvf").race(reader.read());
  reader.releaseLock();
  entry = (await new Bus([join(directory, "devices")]).find(VF))!;
});

afterEach(async () => {
  for (const step of undo.splice(0).reverse()) await step();
  softvf.kill();
  await softvf.exited;
  await rm(directory, { recursive: true });
  expect(liveFds()).toBe(0);
});

/** A driver of the disk: guest memory, rings, kicks and calls, as a front-end has them. */
class Guest implements Disposable {
  readonly memory = new GuestMemoryFile(GUEST, MEMORY);
  readonly kicks = [eventfd(), eventfd()];
  readonly queues: DriverQueue[];
  readonly range;

  constructor() {
    const { dev, ino } = fileInfo(this.memory.file.number);
    this.range = { iova: GUEST, size: MEMORY, offset: 0, file: { dev, ino } };
    this.queues = this.kicks.map((_, index) => {
      const base = GUEST + index * (MEMORY / 2);
      const ring = new DriverRing({ memory: this.memory, base, size: RING, features: 1n << 32n });
      return new DriverQueue(ring, () => signalEventfd(this.kicks[index]!.number));
    });
  }

  get wanted(): DeviceState {
    const queues = this.queues.map(({ ring: { size, desc, driver, device } }, index) => {
      return { index, size, vector: 0, desc, driver, device, lastAvail: 0, lastUsed: 0 };
    });
    return { features: 1n << 32n, status: 0, configVector: 0, config: new Uint8Array(60), queues };
  }

  get eventfds() {
    return new Map(this.kicks.map((kick, i) => [i, { kick: kick.number, call: this.queues[i]!.call.number }]));
  }

  /** Writes a sector through one queue and reads it back through the other. */
  async exchange(sector: number): Promise<void> {
    const data = crypto.getRandomValues(new Uint8Array(SECTOR));
    const { readable, writable } = writeRequest(sector, data);
    const written = await soon("a write").race(this.queues[0]!.request(readable, writable));
    expect(blkResult(written).status).toBe(BlkStatus.ok);
    const request = readRequest(sector, SECTOR);
    const seen = await soon("a read").race(this.queues[1]!.request(request.readable, request.writable));
    expect(blkResult(seen)).toEqual({ status: BlkStatus.ok, data });
  }

  [Symbol.dispose](): void {
    for (const one of [...this.queues, ...this.kicks, this.memory]) one[Symbol.dispose]();
  }
}

interface Parts {
  fn: PciFunction;
  path: DataPath;
  domain: DmaDomain;
}

async function attach(): Promise<Parts> {
  const domain = new DmaDomain(new VfioUserAddressSpace());
  const fn = await domain.open(entry, soon("opening"));
  const path = await DataPath.open(fn, (virtioId) => fakeClass({ virtioId }), soon("probing"));
  await domain.attach(fn);
  const parts = { fn, path, domain };
  undo.push(() => detach(parts));
  return parts;
}

/** Harmless where the parts were abandoned already. */
async function detach({ fn, path, domain }: Parts): Promise<void> {
  path.abandon();
  domain.abandon();
  await fn[Symbol.asyncDispose]();
}

function guest(): Guest {
  const one = new Guest();
  undo.push(() => one[Symbol.dispose]());
  return one;
}

async function running() {
  const parts = await attach();
  const driver = guest();
  await parts.domain.claim("guest", driver.range, driver.memory.file.number);
  await parts.path.start(driver.wanted, driver.eventfds, soon("starting"));
  return { ...parts, driver };
}

test("a block VF is probed: id, queues, vectors, capacity", async () => {
  const { path } = await attach();
  expect(path.deviceClass.virtioId).toBe(2);
  expect(path.queues).toBe(2);
  expect(path.vectors).toBe(3);
  expect(path.queueSizeMax(0)).toBeGreaterThanOrEqual(RING);
  const config = await path.readConfig(60);
  expect(new DataView(config.buffer).getBigUint64(0, true)).toBe(BigInt((4 << 20) / SECTOR));
});

describe("a running VF", () => {
  test("serves requests by kick and call, stops, continues, and starts anew after a reset", async () => {
    const { path, driver } = await running();
    for (let sector = 0; sector < 20; sector++) await driver.exchange(sector);

    const state = await path.stop(driver.memory, "drained", soon("stopping"));
    expect(state.queues.map(({ lastUsed }) => lastUsed)).toEqual([20, 20]);
    await path.start(state, driver.eventfds, soon("continuing"));
    for (let sector = 0; sector < 20; sector++) await driver.exchange(sector);

    await path.reset(soon("reset"));
    expect((await rejection(path.start(state, driver.eventfds, soon("starting")))).message).toMatch(
      /resume at index 20/,
    );
    expect(path.running).toBe(false);
  });

  test("reaches no memory that was taken away, and all that was given", async () => {
    const { path, domain, driver } = await running();
    await driver.exchange(1);
    await path.stop(driver.memory, "drained", soon("stopping"));
    await path.reset(soon("reset"));
    await domain.release("guest", driver.range);

    const next = guest();
    await domain.claim("guest", next.range, next.memory.file.number);
    await path.start(next.wanted, next.eventfds, soon("starting"));
    for (let sector = 0; sector < 20; sector++) await next.exchange(sector);
  });

  test("takes other kicks and calls while it runs", async () => {
    const { path, driver } = await running();
    await driver.exchange(0);
    const [old] = driver.kicks.splice(0, 1, eventfd());
    await path.setKick(0, driver.kicks[0]!.number);
    old![Symbol.dispose]();
    await path.setCall(0, driver.queues[0]!.call.number);
    for (let sector = 0; sector < 20; sector++) await driver.exchange(sector);
  });

  test("goes on in objects made from record and fds, and does not notice", async () => {
    const { fn, path, domain, driver } = await running();
    await driver.exchange(0);
    const record = new Map([fn, path, domain].map((part, i) => [i, take(part.snapshot())]));
    // In flight while nobody is there: the rings are served all the same.
    const { readable, writable } = readRequest(0, SECTOR);
    path.abandon();
    domain.abandon();
    fn.abandon();
    const meanwhile = driver.queues[1]!.request(readable, writable);

    const [one, two, three] = [record.get(0)!, record.get(1)!, record.get(2)!];
    const revivedDomain = DmaDomain.revive(() => new VfioUserAddressSpace(), three.data, three.fds);
    const revived = revivedDomain.reviveFunction(entry, one.data, one.fds);
    const revivedPath = DataPath.revive(revived, two.data, two.fds, (virtioId) => fakeClass({ virtioId }));
    undo.push(() => detach({ fn: revived, path: revivedPath, domain: revivedDomain }));
    expect(blkResult(await soon("the request").race(meanwhile)).status).toBe(BlkStatus.ok);
    for (let sector = 0; sector < 20; sector++) await driver.exchange(sector);

    const state = await revivedPath.stop(driver.memory, "drained", soon("stopping"));
    expect(state.queues.map(({ lastUsed }) => lastUsed)).toEqual([21, 22]);
    await revivedPath.reset(soon("reset"));
    await revivedDomain.release("guest", driver.range);
  });

  test("a server that dies is noticed, and everything about it ends", async () => {
    const { fn, path, domain, driver } = await running();
    let gone: Error | undefined;
    path.onFailure((failure) => {
      if (failure.gone) gone = failure.error;
    });
    softvf.kill("SIGKILL");
    expect((await soon("the loss").race(fn.lost)).message).toMatch(/hung up|reset/);
    expect(gone).toBeDefined();
    await domain.release("guest", driver.range);
    await domain.detach(fn);
    expect(await rejection(path.reset(soon("reset")))).toMatchObject({ code: "connectionLost" });
  });
});

test("memory that is being mapped when the daemon dies is mapped anew, whether it was or not", async () => {
  const domain = new DmaDomain(new VfioUserAddressSpace(), {
    note: async () => void records.push(domain.snapshot().data),
  });
  const records: unknown[] = [];
  const fn = await domain.open(entry, soon("opening"));
  await domain.attach(fn);
  const { range, memory } = guest();
  await domain.claim("guest", range, memory.file.number);
  const parts = take(fn.snapshot());
  domain.abandon();
  fn.abandon();
  // It was the first time; the second time it is unmapped already.
  for (const next of ["killed again", "lives"]) {
    const copies = new Map([...parts.fds].map(([name, fd]) => [name, fd.dup()]));
    const file = new Map([["memory.0", duplicate(memory.file.number)]]);
    const revived = DmaDomain.revive(() => new VfioUserAddressSpace(), records[0] as never, file);
    const revivedFn = revived.reviveFunction(entry, parts.data, copies);
    expect(revived.owners).toEqual([]);
    await revived.takeUp(soon("taking up"));
    if (next === "killed again") {
      revived.abandon();
      revivedFn.abandon();
      continue;
    }
    for (const fd of parts.fds.values()) fd[Symbol.dispose]();
    await revived.claim("guest", range, memory.file.number);
    await revived.release("guest", range);
    // A server that refuses one of these is hung up on.
    expect((revivedFn as VfioUserFunction).gone).toBeUndefined();
    revived.abandon();
    await revivedFn[Symbol.asyncDispose]();
  }
});

function take(snapshot: { data: unknown; fds: ReadonlyMap<string, number> }): {
  data: never;
  fds: Map<string, OwnedFd>;
} {
  const fds = new Map([...snapshot.fds].map(([name, number]) => [name, duplicate(number)]));
  return { data: JSON.parse(JSON.stringify(snapshot.data)) as never, fds };
}
