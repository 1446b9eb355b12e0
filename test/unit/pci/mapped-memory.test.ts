import { afterEach, beforeEach, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { Deadline } from "../../../src/base/deadline.ts";
import { SystemError } from "../../../src/base/errors.ts";
import { silentLogger } from "../../../src/base/log.ts";
import type { OwnedFd } from "../../../src/native/fd.ts";
import { fileInfo, memfd, truncate } from "../../../src/native/sys.ts";
import type { DmaRange } from "../../../src/pci/address-space.ts";
import type { Iommu } from "../../../src/pci/vfio/iommu.ts";
import { MappedMemory } from "../../../src/pci/vfio/mapped-memory.ts";
import { rejection } from "../../kit/rejection.ts";

const GiB = 2 ** 30;
const NAME = "mapped-memory-test";
const ENOMEM = 12;
const ENOSPC = 28;

/** Notes what is mapped, and does what it is told instead. */
class FakeIommu implements Pick<Iommu, "map" | "unmap" | "mappingLimit"> {
  readonly mapped = new Map<number, number>();
  mappingLimit: number | undefined = 3;
  onMap = async (_iova: number): Promise<void> => {};
  onUnmap = async (_iova: number, size: number): Promise<number> => size;

  async map(iova: number, size: number): Promise<void> {
    await this.onMap(iova);
    expect(this.mapped.has(iova)).toBe(false);
    this.mapped.set(iova, size);
  }

  async unmap(iova: number, size: number): Promise<number> {
    const done = await this.onUnmap(iova, size);
    if (done !== size || !this.mapped.has(iova)) return 0;
    expect(this.mapped.get(iova)).toBe(size);
    this.mapped.delete(iova);
    return size;
  }

  get pages(): number[] {
    return [...this.mapped.keys()].map((iova) => iova / GiB);
  }
}

let iommu: FakeIommu & Iommu;
let memory: MappedMemory;
let file: OwnedFd;
let log: string[];

beforeEach(() => {
  iommu = new FakeIommu() as FakeIommu & Iommu;
  log = [];
  memory = new MappedMemory("a VM", { ...silentLogger, error: (text) => log.push(text) });
  file = memfd(NAME, 3 * GiB);
});
afterEach(async () => {
  await memory.dispose(async () => {});
  file[Symbol.dispose]();
  expect(views()).toBe(0);
});

/** How often the file is mapped in this process. */
function views(): number {
  return readFileSync("/proc/self/maps", "utf8").split(`memfd:${NAME}`).length - 1;
}

function range(size = 3 * GiB, iova = GiB): DmaRange {
  const { dev, ino } = fileInfo(file.number);
  return { iova, size, offset: 0, file: { dev, ino } };
}

function map(which = range(), milliseconds = 10_000): Promise<void> {
  return memory.map(iommu, which, file.number, Deadline.after(milliseconds, "mapping"));
}

function unmap(which = range(), milliseconds = 10_000): Promise<void> {
  return memory.unmap(iommu, which, Deadline.after(milliseconds, "unmapping"));
}

function settle(): Promise<void> {
  return memory.settle(iommu, Deadline.after(10_000, "unmapping"));
}

test("memory is mapped and unmapped piece by piece, and is in this process meanwhile", async () => {
  await map();
  expect(iommu.pages).toEqual([1, 2, 3]);
  expect(views()).toBe(3);
  await unmap();
  expect(iommu.pages).toEqual([]);
  expect(views()).toBe(0);
});

test("each piece has the time that the first had", async () => {
  iommu.onMap = () => Bun.sleep(250);
  await map(range(), 600);
  expect(iommu.pages).toEqual([1, 2, 3]);
});

test("where a piece fails those before it are unmapped", async () => {
  iommu.onMap = async (iova) => {
    if (iova === 3 * GiB) throw new SystemError("map", 14);
  };
  expect(await rejection(map())).toMatchObject({ errno: 14 });
  expect(iommu.pages).toEqual([]);
  expect(views()).toBe(0);
});

test("where that fails too the error says what is still mapped, and mapping starts with unmapping it", async () => {
  iommu.onMap = async (iova) => {
    if (iova === 2 * GiB) throw new SystemError("map", 14);
  };
  iommu.onUnmap = async () => 0;
  expect((await rejection(map())).message).toMatch(
    /0x40000000, 0x7fffffff\] could not be unmapped again.*0 of 1073741824/,
  );
  iommu.onMap = async () => {};
  iommu.onUnmap = async (_, size) => size;
  await map();
  expect(iommu.pages).toEqual([1, 2, 3]);
});

test("an unmap that fails in the middle takes the rest, and goes on where it was when it is tried again", async () => {
  await map();
  iommu.onUnmap = async (iova, size) => (iova === 2 * GiB ? 0 : size);
  expect(await rejection(unmap())).toMatchObject({ code: "iommuDomain" });
  expect(iommu.pages).toEqual([2]);
  iommu.onUnmap = async (_, size) => size;
  await unmap();
  expect(iommu.pages).toEqual([]);
});

test("of what is to be unmapped again all is tried, and nothing else is mapped before the rest is unmapped", async () => {
  let stuck = true;
  iommu.onMap = async (iova) => {
    if (iova === 4 * GiB) throw new SystemError("map", 14);
  };
  iommu.onUnmap = async (iova, size) => (stuck && iova === 3 * GiB ? 0 : size);
  const four = range(4 * GiB);
  truncate(file.number, 4 * GiB);
  expect((await rejection(map(four))).message).toContain("0xc0000000, 0xffffffff] could not be unmapped again");
  expect(iommu.pages).toEqual([3]);
  expect(views()).toBe(1);
  const elsewhere = range(4096, 8 * GiB);
  const refused = await rejection(map(elsewhere));
  expect(refused).toMatchObject({ code: "iommuDomain", fix: expect.stringContaining("remove the VFs") });
  expect(refused.message).toMatch(/0xc0000000, 0xffffffff\] of a VM is left of a map that failed/);
  expect((await rejection(settle())).message).toBe(refused.message);
  stuck = false;
  await settle();
  expect(iommu.pages).toEqual([]);
  expect(views()).toBe(0);
  await map(elsewhere);
});

test("what the kernel does not answer about is not asked for piece by piece", async () => {
  let asked = 0;
  iommu.onMap = async (iova) => {
    if (iova === 3 * GiB) throw new SystemError("map", 14);
  };
  const { promise, resolve } = Promise.withResolvers<number>();
  iommu.onUnmap = () => {
    asked++;
    return promise;
  };
  expect((await rejection(map(range(), 200))).message).toContain("0xbfffffff] could not be unmapped again");
  expect(asked).toBe(1);
  resolve(GiB);
  await settle();
  expect(iommu.pages).toEqual([]);
});

test("a map that nobody wants any more ends before its next piece, and is undone", async () => {
  let wanted = true;
  iommu.onMap = async (iova) => {
    if (iova === 2 * GiB) wanted = false;
  };
  const soon = Deadline.after(10_000, "mapping");
  expect(await rejection(memory.map(iommu, range(), file.number, soon, () => !wanted))).toMatchObject({
    code: "cancelled",
  });
  expect(iommu.pages).toEqual([]);
  expect(views()).toBe(0);
});

test("nothing stays in this process where there is no time left to map it", async () => {
  expect(await rejection(map(range(4096), 0))).toMatchObject({ code: "timedOut" });
  expect(views()).toBe(0);
});

test("what is mapped after the deadline is unmapped at once, and who comes next waits for that", async () => {
  const { promise, resolve } = Promise.withResolvers<void>();
  iommu.onMap = () => promise;
  const small = range(4096);
  expect(await rejection(map(small, 5))).toMatchObject({ code: "timedOut" });
  const again = map(small);
  await Bun.sleep(5);
  expect(iommu.mapped.size).toBe(0);
  resolve();
  await again;
  expect(iommu.mapped.size).toBe(1);
  expect(views()).toBe(1);
});

test("what is mapped after the deadline is unmapped, also where nobody comes next", async () => {
  const { promise, resolve } = Promise.withResolvers<void>();
  iommu.onMap = () => promise;
  await rejection(map(range(4096), 5));
  resolve();
  await memory.dispose(async () => {});
  expect(iommu.mapped.size).toBe(0);
});

test("what stays mapped after the deadline is told of, and nothing else is mapped before it is unmapped", async () => {
  const { promise, resolve } = Promise.withResolvers<void>();
  iommu.onMap = () => promise;
  iommu.onUnmap = async () => 0;
  await rejection(map(range(4096), 5));
  resolve();
  iommu.onMap = async () => {};
  expect((await rejection(map(range(4096, 8 * GiB)))).message).toContain("left of a map that failed");
  expect(log).toEqual([expect.stringContaining("stays mapped")]);
  iommu.onUnmap = async (_, size) => size;
  await map(range(4096, 8 * GiB));
  expect(iommu.pages).toEqual([8]);
});

test("what is unmapped after the deadline is unmapped when it is tried again", async () => {
  await map(range(4096));
  const { promise, resolve } = Promise.withResolvers<number>();
  iommu.onUnmap = () => promise;
  expect(await rejection(unmap(range(4096), 5))).toMatchObject({ code: "timedOut" });
  const again = unmap(range(4096));
  resolve(4096);
  await again;
  expect(iommu.mapped.size).toBe(0);
});

test("the kernel's limit of mappings is named", async () => {
  iommu.onMap = () => Promise.reject(new SystemError("map", ENOSPC));
  expect(await rejection(map())).toMatchObject({
    code: "limitExceeded",
    fix: expect.stringContaining("dma_entry_limit"),
  });
  expect((await rejection(map())).message).toContain("limit of 3 mappings");
});

test("memory that is short for another reason than the limit of locked memory is passed on", async () => {
  iommu.onMap = () => Promise.reject(new SystemError("map", ENOMEM));
  const error = await rejection(map(range(4096)));
  expect(error).toMatchObject({ number: ENOMEM });
});

test("memory that is cut inside the pages of its file keeps its place in them", async () => {
  const part = { ...range(4096), offset: 12_288 };
  await map(part);
  await unmap(part);
  expect(iommu.mapped.size).toBe(0);
});
