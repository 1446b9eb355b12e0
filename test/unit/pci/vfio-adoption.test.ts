import { afterEach, beforeEach, describe, expect, mock, test } from "bun:test";
import * as fs from "node:fs";
import { Deadline } from "../../../src/base/deadline.ts";
import type { Json } from "../../../src/base/json.ts";
import { silentLogger } from "../../../src/base/log.ts";
import { duplicate, liveFds, type OwnedFd } from "../../../src/native/fd.ts";
import * as slow from "../../../src/native/slow.ts";
import { fileInfo, memfd } from "../../../src/native/sys.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import type { DmaRange } from "../../../src/pci/address-space.ts";
import type { FunctionSnapshot, PciFunction } from "../../../src/pci/function.ts";
import type { KernelEntry } from "../../../src/pci/vfio/iommu.ts";
import * as memlock from "../../../src/pci/vfio/memlock.ts";
import { piecesOf } from "../../../src/pci/vfio/pieces.ts";
import { FakeFunction } from "../../kit/fake-function.ts";
import { rejection } from "../../kit/rejection.ts";
import { FakeKernel, LIMIT } from "./vfio-fake-kernel.ts";

/**
 * Address spaces of which the process dies, whatever the kernel was doing for it, and another one goes on with what stood in
 * its record. The kernel is made of JavaScript; the record is written as DmaDomain does.
 */

const GiB = 2 ** 30;
const MiB = 2 ** 20;
/** More requests than any process here makes. */
const MANY = 200;
const INTERFACES = ["group", "iommufd"] as const;
type Interface = (typeof INTERFACES)[number];

let kernel: FakeKernel;
let file: OwnedFd;
/** What stands in the way of locking memory. */
let refusal: Error | undefined;

mock.module("../../../src/pci/vfio/device-file.ts", () => ({
  openDeviceFile: (path: string) => kernel.openFile(path),
}));
mock.module("../../../src/native/slow.ts", () => ({
  ...slow,
  slowIoctl: (fd: number, number: number, argument: Uint8Array) => kernel.ioctl(fd, number, argument),
}));
mock.module("../../../src/pci/vfio/memlock.ts", () => ({
  ...memlock,
  ownMemlockError: async () => refusal,
}));
mock.module("node:fs", () => ({ ...fs, existsSync: (path: string) => path === "/dev/iommu" || fs.existsSync(path) }));
mock.module("../../../src/pci/vfio/function.ts", () => ({
  VfioFunction: {
    over: async (_entry: unknown, device: OwnedFd, leave: () => void) => functionOf(device, leave),
    revive: (_entry: unknown, leave: () => void, _data: Json, fds: ReadonlyMap<string, OwnedFd>) =>
      functionOf(fds.get("device")!, leave),
  },
}));
const { VfioAddressSpace } = await import("../../../src/pci/vfio/address-space.ts");
type Space = InstanceType<typeof VfioAddressSpace>;

beforeEach(() => {
  kernel = new FakeKernel();
  file = memfd("vfio-adoption", 3 * GiB);
  refusal = undefined;
});
afterEach(async () => {
  file[Symbol.dispose]();
  // Memory is given back behind the end of its address space.
  const nothing = () => liveFds() === 0 && !fs.readFileSync("/proc/self/maps", "utf8").includes("vfio-adoption");
  await Deadline.after(1000, "the fds and mappings").poll(() => nothing() || undefined, 1);
});

/** What is a function here: its device's fd. */
function functionOf(device: OwnedFd, leave: () => void): PciFunction {
  return Object.assign(new FakeFunction(), {
    get deviceFd() {
      return device.number;
    },
    snapshot: () => ({ data: {}, fds: new Map([["device", device.number]]) }),
    [Symbol.asyncDispose]: async () => {
      if (device.closed) return;
      device[Symbol.dispose]();
      leave();
    },
  });
}

const soon = () => Deadline.after(10_000, "the test");
const settings = (kind: Interface) => ({ interface: kind, token: async () => "", log: silentLogger });

/** Functions in groups of their own. */
function entryOf(number: number): KernelEntry {
  const transport = { kind: "vfio", driver: "vfio-pci", group: 4240 + number, cdev: `vfio${number}` } as const;
  return {
    ...{ address: parsePciAddress(`5a:00.${number}`), directory: "/nowhere", vendor: 0x1af4, device: 0x1042, class: 0 },
    ...{ physfn: undefined, virtfns: new Map() },
    transport: { ...transport, takesToken: false, numaNode: undefined },
  };
}

function range(iova: number, size: number): DmaRange {
  const { dev, ino } = fileInfo(file.number);
  return { iova, size, offset: 0, file: { dev, ino } };
}

const withFile = (ranges: readonly DmaRange[]) => ranges.map((one) => ({ ...one, fd: file.number }));
/** Across two borders of pieces. */
const LOW = () => range(GiB - MiB, 2 * GiB - 2 * MiB);
const HIGH = () => range(8 * GiB, MiB);
const MORE = () => range(16 * GiB, MiB);

interface Stored {
  readonly data: Json;
  readonly fds: ReadonlyMap<string, OwnedFd>;
}

/** The keeper, and a DmaDomain as far as it writes records. */
class Journal implements Disposable {
  space: Stored | undefined;
  functions = new Map<number, Stored>();
  mapped: readonly DmaRange[] = [];
  underWay: DmaRange | undefined;

  note(space: Space, change: Partial<Pick<Journal, "mapped" | "underWay">> = {}): void {
    Object.assign(this, { underWay: undefined, ...change });
    close(this.space);
    this.space = store(space.snapshot()!);
  }

  noteFunction(number: number, fn: PciFunction): void {
    close(this.functions.get(number));
    this.functions.set(number, store(fn.snapshot()));
  }

  [Symbol.dispose](): void {
    for (const stored of [this.space, ...this.functions.values()]) close(stored);
  }
}

function store({ data, fds }: FunctionSnapshot): Stored {
  return { data: JSON.parse(JSON.stringify(data)), fds: new Map([...fds].map(([name, fd]) => [name, duplicate(fd)])) };
}

function copy({ data, fds }: Stored): { data: Json; fds: Map<string, OwnedFd> } {
  return { data, fds: new Map([...fds].map(([name, fd]) => [name, fd.dup()])) };
}

function close(stored: Stored | undefined): void {
  for (const fd of stored?.fds.values() ?? []) fd[Symbol.dispose]();
}

/** One process: what it has open is closed with it. */
class Process implements AsyncDisposable {
  readonly functions = new Map<number, PciFunction>();
  ended = false;

  constructor(
    readonly space: Space,
    readonly journal: Journal,
  ) {}

  async add(number: number): Promise<void> {
    const fn = await this.space.open(entryOf(number), soon());
    this.functions.set(number, fn);
    await this.space.attach(fn, withFile(this.journal.mapped), soon());
    this.journal.note(this.space);
    this.journal.noteFunction(number, fn);
  }

  async map(one: DmaRange): Promise<void> {
    this.journal.note(this.space, { underWay: one });
    await this.space.map(one, file.number, soon());
    this.journal.note(this.space, { mapped: [...this.journal.mapped, one] });
  }

  async unmap(one: DmaRange): Promise<void> {
    const mapped = this.journal.mapped.filter(({ iova }) => iova !== one.iova);
    this.journal.note(this.space, { mapped, underWay: one });
    await this.space.unmap(one, soon());
    this.journal.note(this.space, { mapped });
  }

  /** Goes on with what stands in the record. */
  static async successor(kind: Interface, journal: Journal): Promise<Process> {
    await using undo = new AsyncDisposableStack();
    const space = VfioAddressSpace.revive("a VM", copy(journal.space!), settings(kind));
    const process = undo.use(new Process(space, journal));
    for (const [number, stored] of journal.functions) {
      const { data, fds } = copy(stored);
      const fn = space.revive(entryOf(number), data, fds);
      space.adopt(fn);
      process.functions.set(number, fn);
    }
    if (journal.underWay !== undefined) await space.unmapIfThere(journal.underWay, soon());
    await space.takeUp(withFile(journal.mapped), soon());
    space.adoptedAll();
    journal.note(space);
    undo.move();
    return process;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const fn of this.functions.values()) await fn[Symbol.asyncDispose]();
    this.space[Symbol.dispose]();
  }
}

/** All that is done in a life. */
async function live(process: Process): Promise<void> {
  await process.add(1);
  await process.map(LOW());
  await process.add(2);
  await process.map(HIGH());
  await process.unmap(LOW());
}

/** How the kernel has what stands in the record. @param process by whose memory, where that matters */
function expectedMappings(journal: Journal, process: number) {
  return journal.mapped.flatMap(piecesOf).map(({ iova, size }) => ({ iova, size, process }));
}

/** It can do all that a process can that was there from the begin. */
async function expectWhole(process: Process, kind: Interface): Promise<void> {
  const { space, journal } = process;
  expect(space.interface).toBe(kind);
  if (kind === "group") expect(kernel.mapped).toEqual(expectedMappings(journal, kernel.process));
  else expect(kernel.mapped).toMatchObject(expectedMappings(journal, 1).map(({ iova, size }) => ({ iova, size })));
  expect(space.pageSize).toBe(4096);
  expect(space.ioRanges).toHaveLength(1);
  await process.add(3);
  await process.map(MORE());
  for (const one of journal.mapped) await process.unmap(one);
  expect(kernel.mapped).toEqual([]);
}

/** A process that dies at a request. @returns whether it came that far */
async function dieAt(process: Process, at: number, after: boolean, work: () => Promise<unknown>): Promise<boolean> {
  kernel.death = { at, after };
  const error = await work().then(
    () => undefined,
    (thrown: Error) => thrown,
  );
  await process[Symbol.asyncDispose]();
  const came = kernel.asked.length >= at;
  if (!came && error !== undefined) throw error;
  kernel.next();
  return came;
}

describe.each(INTERFACES)("over %s", (kind) => {
  for (const after of [false, true]) {
    test(`a process that dies at any request, ${after ? "after" : "before"} it took effect, is gone on with`, async () => {
      let deaths = 0;
      for (let at = 1; at < MANY; at++) {
        kernel = new FakeKernel();
        using journal = new Journal();
        const process = new Process(new VfioAddressSpace("a VM", settings(kind)), journal);
        if (!(await dieAt(process, at, after, () => live(process)))) break;
        deaths++;
        // Nothing is known of it, and all that it had is closed.
        if (journal.space === undefined) continue;
        await using successor = await Process.successor(kind, journal);
        await expectWhole(successor, kind);
      }
      expect(deaths).toBeGreaterThan(kind === "group" ? 15 : 12);
    });
  }

  test("a successor that dies at any request is gone on with", async () => {
    for (const after of [false, true]) {
      let deaths = 0;
      for (let at = 1; at < MANY; at++) {
        kernel = new FakeKernel();
        using journal = new Journal();
        const first = new Process(new VfioAddressSpace("a VM", settings(kind)), journal);
        await live(first);
        await first.map(LOW());
        journal.note(first.space, { mapped: journal.mapped.slice(0, 1), underWay: LOW() });
        await first[Symbol.asyncDispose]();
        kernel.next();
        kernel.death = { at, after };
        const second = await Process.successor(kind, journal).catch(() => undefined);
        const came = kernel.asked.length >= at;
        if (second !== undefined) await second[Symbol.asyncDispose]();
        kernel.next();
        await using third = await Process.successor(kind, journal);
        await expectWhole(third, kind);
        if (!came) break;
        deaths++;
      }
      expect(deaths).toBeGreaterThan(1);
    }
  });

  test("a revival says nothing to the kernel, and nothing else is done before all is taken up", async () => {
    using journal = new Journal();
    const first = new Process(new VfioAddressSpace("a VM", settings(kind)), journal);
    await live(first);
    await first[Symbol.asyncDispose]();
    kernel.next();
    using space = VfioAddressSpace.revive("a VM", copy(journal.space!), settings(kind));
    const { data, fds } = copy(journal.functions.get(1)!);
    await using fn = space.revive(entryOf(1), data, fds);
    space.adopt(fn);
    expect(kernel.asked).toEqual([]);
    const early = [
      () => space.map(MORE(), file.number, soon()),
      () => space.open(entryOf(3), soon()),
      () => space.attach(fn, [], soon()),
    ];
    for (const call of early) expect(await rejection(call())).toMatchObject({ code: "invalid" });
    expect(kernel.asked).toEqual([]);
    // But for what nobody wants to be mapped any more.
    await space.settle(soon());
    await space.unmap(HIGH(), soon());
    expect(kernel.mapped).toEqual([]);
    expect(space.snapshot()).toEqual({ data: journal.space!.data, fds: expect.any(Map) });
  });

  test("what a map that failed has left, and what was being mapped, is unmapped by the successor", async () => {
    using journal = new Journal();
    const first = new Process(new VfioAddressSpace("a VM", settings(kind)), journal);
    await first.add(1);
    const name = kind === "group" ? "VFIO_IOMMU_UNMAP_DMA" : "IOMMU_IOAS_UNMAP";
    const { ioctl } = kernel;
    const gate = Promise.withResolvers<void>();
    let maps = 0;
    kernel.ioctl = async (fd, number, argument) => {
      const result = await ioctl(fd, number, argument);
      if (kernel.asked.at(-1)?.includes("_MAP") && maps++ === 0) await gate.promise;
      return result;
    };
    // Nobody waits for it any more, and it is mapped.
    expect(await rejection(first.space.map(HIGH(), file.number, Deadline.after(5, "mapping")))).toMatchObject({
      code: "timedOut",
    });
    journal.note(first.space);
    expect(journal.space!.data).toMatchObject({ left: [{ iova: 8 * GiB, size: MiB }] });
    expect(kernel.mapped).toHaveLength(1);
    kernel.death = { at: kernel.asked.length + 1, after: false };
    gate.resolve();
    // It dies as it takes it back.
    await soon().poll(() => kernel.dead || undefined, 1);
    await first[Symbol.asyncDispose]();
    kernel.next();
    {
      // A process that dies before it has taken anything up.
      using space = VfioAddressSpace.revive("a VM", copy(journal.space!), settings(kind));
      const { left } = journal.space!.data as { readonly left: Json };
      expect(space.snapshot()!.data).toMatchObject({ left });
    }
    await using successor = await Process.successor(kind, journal);
    expect(kernel.asked).toContain(name);
    expect(kernel.mapped).toEqual([]);
    expect(successor.space.snapshot()!.data).toMatchObject({ left: [] });
  });

  test("records and fds that do not fit are refused, and all is closed", async () => {
    using journal = new Journal();
    const first = new Process(new VfioAddressSpace("a VM", settings(kind)), journal);
    await live(first);
    await first[Symbol.asyncDispose]();
    const good = journal.space!;
    const revive = (data: Json, change: (fds: Map<string, OwnedFd>) => void = () => {}) => {
      const { fds } = copy(good);
      change(fds);
      return () => VfioAddressSpace.revive("a VM", { data, fds }, settings(kind))[Symbol.dispose]();
    };
    const before = liveFds();
    for (const bad of [
      null,
      {},
      { ...(good.data as object), interface: "none" },
      { ...(good.data as object), left: 1 },
    ]) {
      expect(revive(bad)).toThrow("the stored address space is not understood");
    }
    const [name] = good.fds.keys();
    const lose = (fds: Map<string, OwnedFd>) => {
      fds.get(name!)![Symbol.dispose]();
      fds.delete(name!);
    };
    expect(revive(good.data, lose)).toThrow(`lacks the descriptor ${name}`);
    expect(revive(good.data, (fds) => fds.set("another", file.dup()))).toThrow("spare fds: another");
    expect(liveFds()).toBe(before);
  });
});

test("a type 1 mapping that is not there is said, all others are taken up, and it may be tried again", async () => {
  using journal = new Journal();
  const first = new Process(new VfioAddressSpace("a VM", settings("group")), journal);
  await live(first);
  await first[Symbol.asyncDispose]();
  kernel.next();
  await using process = new Process(VfioAddressSpace.revive("a VM", copy(journal.space!), settings("group")), journal);
  const error = await rejection(process.space.takeUp(withFile([LOW(), HIGH()]), soon()));
  expect(error).toMatchObject({ code: "iommuDomain" });
  expect(error.message).toContain("mapped at 0x3ff00000");
  expect(kernel.mapped).toEqual([{ iova: 8 * GiB, size: MiB, process: 2 }]);
  await process.space.takeUp(withFile([HIGH()]), soon());
  await process.space.unmap(HIGH(), soon());
  expect(kernel.mapped).toEqual([]);
});

test("where not enough memory may be locked nothing is touched, and it may be tried again", async () => {
  using journal = new Journal();
  const first = new Process(new VfioAddressSpace("a VM", settings("group")), journal);
  await live(first);
  await first[Symbol.asyncDispose]();
  const before = kernel.mapped;
  kernel.next();
  await using process = new Process(VfioAddressSpace.revive("a VM", copy(journal.space!), settings("group")), journal);
  refusal = new Error("the limit");
  expect(await rejection(process.space.takeUp(withFile([HIGH()]), soon()))).toBe(refusal);
  expect(kernel.mapped).toEqual(before);
  // It would be given what this process has where the other one had the guest's memory.
  const { asked } = kernel;
  const count = asked.length;
  const denied = await rejection(process.space.open(entryOf(3), soon()));
  expect(denied).toMatchObject({ code: "iommuDomain", message: expect.stringContaining("[0x200000000, 0x2000fffff]") });
  expect(asked).toHaveLength(count);
  refusal = undefined;
  await process.space.takeUp(withFile([HIGH()]), soon());
  expect(kernel.mapped).toEqual([{ iova: 8 * GiB, size: MiB, process: 2 }]);
  await (await process.space.open(entryOf(3), soon()))[Symbol.asyncDispose]();
});

test("what was mapped by another process is unmapped, also where it was not said that it is mapped", async () => {
  using journal = new Journal();
  const first = new Process(new VfioAddressSpace("a VM", settings("group")), journal);
  await live(first);
  await first[Symbol.asyncDispose]();
  kernel.next();
  await using process = new Process(VfioAddressSpace.revive("a VM", copy(journal.space!), settings("group")), journal);
  await process.space.takeUp([], soon());
  await process.space.unmap(HIGH(), soon());
  expect(kernel.mapped).toEqual([]);
});

test("a container without groups has nothing mapped", async () => {
  using journal = new Journal();
  await using process = new Process(new VfioAddressSpace("a VM", settings("group")), journal);
  await process.add(1);
  kernel.closeGroups();
  // It believes that there is one.
  expect(await rejection(process.space.unmapIfThere(HIGH(), soon()))).toMatchObject({ errno: 22 });
  await process.functions.get(1)![Symbol.asyncDispose]();
  await process.space.unmapIfThere(HIGH(), soon());
});

test("an IOAS whose last function was detached is mapped anew for the next one", async () => {
  using journal = new Journal();
  const first = new Process(new VfioAddressSpace("a VM", settings("iommufd")), journal);
  await first.add(1);
  await first.map(LOW());
  await first[Symbol.asyncDispose]();
  kernel.next();
  await using process = await Process.successor("iommufd", journal);
  const [[, fn]] = [...process.functions] as [[number, PciFunction]];
  expect(kernel.mapped.map((one) => one.process)).toEqual([1, 1, 1]);
  await process.space.detach(fn, [LOW()], soon());
  await fn[Symbol.asyncDispose]();
  await process.add(2);
  expect(kernel.mapped).toEqual(expectedMappings(journal, 2));
  await process.unmap(LOW());
  expect(kernel.mapped).toEqual([]);
});

test("an IOAS is not mapped anew where another function may reach it: that it cannot be shared is said", async () => {
  using journal = new Journal();
  const first = new Process(new VfioAddressSpace("a VM", settings("iommufd")), journal);
  await live(first);
  await first[Symbol.asyncDispose]();
  kernel.next();
  await using process = await Process.successor("iommufd", journal);
  for (const fn of process.functions.values()) await process.space.detach(fn, [HIGH()], soon());
  const denied = await rejection(process.add(3));
  expect(denied).toMatchObject({ code: "iommuDomain", message: expect.stringContaining("an earlier process") });
  expect(kernel.mapped.map((one) => one.process)).toEqual([1]);
});

test("what is mapped for certain is not taken for what a map has left", async () => {
  using journal = new Journal();
  const first = new Process(new VfioAddressSpace("a VM", settings("group")), journal);
  await live(first);
  await first[Symbol.asyncDispose]();
  kernel.next();
  const { data, fds } = copy(journal.space!);
  const left = [{ iova: HIGH().iova, size: HIGH().size }];
  using space = VfioAddressSpace.revive("a VM", { data: { ...(data as object), left }, fds }, settings("group"));
  await space.takeUp(withFile([HIGH()]), soon());
  expect(kernel.mapped).toEqual(expectedMappings(journal, 2));
});

test("the kernel's limit of mappings is what it is, whoever has made those that are there", async () => {
  using journal = new Journal();
  const first = new Process(new VfioAddressSpace("a VM", settings("group")), journal);
  await live(first);
  await first.map(LOW());
  await first[Symbol.asyncDispose]();
  kernel.next();
  await using process = await Process.successor("group", journal);
  kernel.limit = kernel.mapped.length;
  expect(await rejection(process.map(MORE()))).toMatchObject({
    code: "limitExceeded",
    message: expect.stringContaining(`limit of ${LIMIT} mappings`),
  });
});

test("groups of functions that nobody has taken up leave when all others have been", async () => {
  using journal = new Journal();
  const first = new Process(new VfioAddressSpace("a VM", settings("group")), journal);
  await live(first);
  await first[Symbol.asyncDispose]();
  kernel.next();
  close(journal.functions.get(2));
  journal.functions.delete(2);
  await using process = new Process(VfioAddressSpace.revive("a VM", copy(journal.space!), settings("group")), journal);
  const names = () => [...process.space.snapshot()!.fds.keys()];
  const { data, fds } = copy(journal.functions.get(1)!);
  process.functions.set(1, process.space.revive(entryOf(1), data, fds));
  await process.space.unmapIfThere(MORE(), soon());
  await process.space.takeUp(withFile([HIGH()]), soon());
  expect(names()).toEqual(["container", "group.4241", "group.4242"]);
  process.space.adoptedAll();
  expect(names()).toEqual(["container", "group.4241"]);
  // The last one stays as long as something is mapped.
  await process.functions.get(1)![Symbol.asyncDispose]();
  expect(names()).toEqual(["container", "group.4241"]);
  await process.space.unmap(HIGH(), soon());
  expect(names()).toEqual(["container"]);
  const stranger = copy(journal.functions.get(1)!);
  expect(() => process.space.revive(entryOf(5), stranger.data, stranger.fds)).toThrow("is not in its container");
});
