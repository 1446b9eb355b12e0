import { heapStats } from "bun:jsc";
import { expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { silentLogger } from "../../../src/base/log.ts";
import type { ForwardedRequest } from "../../../src/native/ring-engine.ts";
import type { RingLog } from "../../../src/native/ring-log.ts";
import { AdminService } from "../../../src/softvf/admin-service.ts";
import { ManagedVf } from "../../../src/softvf/managed-vf.ts";
import { PfSettings } from "../../../src/softvf/pf-options.ts";
import { VfTracker } from "../../../src/softvf/vf-tracker.ts";
import { encodeState, type VendorState } from "../../../src/virtio/admin/state-blob.ts";
import {
  ADMIN_HEADER,
  AdminClass,
  InternalStatus,
  type InternalStatusName,
  MigrationCommand,
  type MigrationCommandName,
  MODIFY_STATUS_DATA,
  TRANSFER_DATA,
} from "../../../src/virtio/admin/vendor.ts";

/** Nobody tracks anything here. */
const NO_LOG = { cut: () => {} } as unknown as RingLog;

const soon = (what: string) => Deadline.after(10_000, what);
const DATA = 0x84;
const INTERNAL = 0x85;
const ERROR = 0x81;

const STATE: VendorState = {
  common: {
    deviceFeatureSelect: 0,
    deviceFeatures: 0n,
    driverFeatureSelect: 0,
    driverFeatures: 0n,
    configVector: 0xffff,
    numQueues: 0,
    queueSelect: 0,
    status: 0,
    configGeneration: 0,
  },
  config: new Uint8Array(5000),
  queues: [],
  indices: [],
  inFlight: [],
  completed: [],
  others: [],
};

/** The device behind a VF: it does what it is told, or hangs. */
class Device {
  internalStatus: InternalStatusName = "freezed";
  hangs = false;
  refuses = false;
  /** What was done, in which turn of the event loop. */
  readonly done: { readonly what: string; readonly turn: number }[] = [];
  private handler = () => {};

  constructor(private readonly clock: Clock) {}

  onReset(handler: () => void): void {
    this.handler = handler;
  }

  reset(): void {
    this.internalStatus = "init";
    this.handler();
  }

  async changeInternal(to: InternalStatusName): Promise<void> {
    this.note("change");
    if (this.hangs) await new Promise(() => {});
    this.internalStatus = to;
  }

  async save(): Promise<VendorState> {
    this.note("save");
    return STATE;
  }

  async restore(): Promise<void> {
    this.note("restore");
    if (this.refuses) throw new Error("as asked");
  }

  private note(what: string): void {
    this.done.push({ what, turn: this.clock.turn });
  }
}

/** Counts the turns of the event loop. */
class Clock implements Disposable {
  turn = 0;
  private pending = setImmediate(() => this.tick());

  private tick(): void {
    this.turn++;
    this.pending = setImmediate(() => this.tick());
  }

  [Symbol.dispose](): void {
    clearImmediate(this.pending);
  }
}

/** An administrator without a virtqueue between. */
class Administrator {
  private requests: ForwardedRequest[] = [];
  private readonly answers = new Map<number, (status: number) => void>();
  private id = 0;
  private readonly source = {
    takeRequests: () => this.requests.splice(0),
    answer: (id: number, bytes: Uint8Array) => this.answers.get(id)?.(bytes.at(-1)!),
  };

  constructor(readonly service: AdminService) {}

  /** All at once. @returns their status bytes */
  async send(...commands: readonly (readonly [MigrationCommandName, ...data: Uint8Array[]])[]): Promise<number[]> {
    const answers = commands.map((command) => this.begin(...command));
    this.service.serve(this.source);
    return Promise.all(answers);
  }

  /** One that may never be answered. */
  begin(name: MigrationCommandName, ...data: readonly Uint8Array[]): Promise<number> {
    const { promise, resolve } = Promise.withResolvers<number>();
    const header = ADMIN_HEADER.encode({ class: AdminClass.migration, command: MigrationCommand[name] });
    const id = ++this.id;
    this.answers.set(id, resolve);
    this.requests.push({ id, queue: 0, readable: Buffer.concat([header, ...data]), writable: 16_384 });
    return promise;
  }
}

const blob = encodeState(STATE);
const place = (vf: number, offset: number, length: number) =>
  TRANSFER_DATA.encode({ vdevId: vf + 1, offset: BigInt(offset), length: BigInt(length) });
const piece = (vf: number, offset: number, end: number) =>
  ["restore", place(vf, offset, end - offset), blob.subarray(offset, end)] as const;
const whole = (vf: number) => piece(vf, 0, blob.length);
const part = (vf: number, offset: number, length: number) => ["save", place(vf, offset, length)] as const;
const step = (vf: number, to: InternalStatusName) =>
  ["modifyStatus", MODIFY_STATUS_DATA.encode({ vdevId: vf + 1, status: InternalStatus[to] })] as const;

function pf(count: number) {
  const clock = new Clock();
  const devices = Array.from({ length: count }, () => new Device(clock));
  const vfs = devices.map((device) => new ManagedVf(device, () => "drain", new VfTracker(NO_LOG, NO_LOG)));
  const service = new AdminService(0, () => vfs, new PfSettings(), silentLogger);
  return { devices, admin: new Administrator(service), [Symbol.dispose]: () => clock[Symbol.dispose]() };
}

test("the event loop has a turn between two commands, on whatever VFs they are", async () => {
  using bench = pf(4);
  const commands = Array.from({ length: 32 }, (_, index) => whole(index % 4));
  expect(await bench.admin.send(...commands)).toEqual(commands.map(() => 0));
  const turns = bench.devices.flatMap(({ done }) => done.map(({ turn }) => turn));
  expect(turns).toHaveLength(32);
  expect(new Set(turns).size).toBeGreaterThan(30);
});

test("a state is taken once, and pieces without bytes never", async () => {
  using bench = pf(1);
  const nothing = (offset: number) => piece(0, offset, offset);
  const sent = await bench.admin.send(
    nothing(0),
    piece(0, 0, 4096),
    nothing(4096),
    piece(0, 4096, blob.length),
    nothing(blob.length),
    piece(0, 4096, blob.length),
    whole(0),
  );
  expect(sent).toEqual([DATA, 0, DATA, 0, DATA, DATA, 0]);
  expect(bench.devices[0]!.done).toHaveLength(2);
});

test("of what was refused nothing is left but that the state is not whole", async () => {
  using bench = pf(1);
  const [device] = bench.devices;
  device!.refuses = true;
  expect(await bench.admin.send(whole(0), step(0, "quiesced"))).toEqual([INTERNAL, INTERNAL]);
  device!.refuses = false;
  // A piece out of place, and the one that would have been in its place.
  const sent = await bench.admin.send(piece(0, 0, 4096), piece(0, 8, 16), piece(0, 4096, blob.length));
  expect(sent).toEqual([0, DATA, DATA]);
  expect(await bench.admin.send(step(0, "quiesced"), whole(0), step(0, "quiesced"))).toEqual([INTERNAL, 0, 0]);
});

test("a state that is read is kept until its last piece, a VF's reset or the PF's", async () => {
  using bench = pf(1);
  const { admin, devices } = bench;
  const rest = part(0, 4096, blob.length - 4096);
  expect(await admin.send(part(0, 0, 4096), rest, rest)).toEqual([0, 0, DATA]);
  expect(await admin.send(part(0, 0, 4096))).toEqual([0]);
  devices[0]!.reset();
  expect(await admin.send(rest, part(0, 0, 4096))).toEqual([DATA, 0]);
  admin.service.forget();
  expect(await admin.send(rest)).toEqual([DATA]);
});

test("what a PF's driver had begun to restore is dropped with it, and known; a reset of the VF forgets it", async () => {
  using bench = pf(1);
  const { admin, devices } = bench;
  const rest = piece(0, 4096, blob.length);
  expect(await admin.send(piece(0, 0, 4096))).toEqual([0]);
  admin.service.forget();
  expect(await admin.send(rest, step(0, "quiesced"))).toEqual([DATA, INTERNAL]);
  expect(await admin.send(whole(0), piece(0, 0, 4096))).toEqual([0, 0]);
  devices[0]!.reset();
  expect(await admin.send(rest)).toEqual([ERROR]);
  devices[0]!.internalStatus = "freezed";
  expect(await admin.send(rest, step(0, "quiesced"))).toEqual([DATA, 0]);
});

test("commands that wait when the PF is reset are gone with their bytes", async () => {
  using bench = pf(1);
  const { admin, devices } = bench;
  const [device] = devices;
  device!.hangs = true;
  const MEBIBYTE = 1 << 20;
  const [name, at] = piece(0, 0, 4096);
  const large = new Uint8Array(MEBIBYTE);
  const held = () => {
    Bun.gc(true);
    return heapStats().extraMemorySize;
  };
  const before = held();
  void admin.send(step(0, "quiesced"), ...Array.from({ length: 40 }, () => [name, at, large] as const));
  await soon("the step").poll(() => device!.done.length > 0 || undefined, 1);
  expect(held()).toBeGreaterThan(before + 40 * MEBIBYTE);
  admin.service.forget();
  await soon("the memory").poll(() => held() < before + 4 * MEBIBYTE || undefined, 5);
});
