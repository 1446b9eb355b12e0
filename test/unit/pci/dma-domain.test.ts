import { afterEach, describe, expect, test } from "bun:test";
import { duplicate, liveFds, type OwnedFd } from "../../../src/native/fd.ts";
import { fileInfo, memfd } from "../../../src/native/sys.ts";
import type { AddressSpace, DmaRange } from "../../../src/pci/address-space.ts";
import { DmaDomain } from "../../../src/pci/dma-domain.ts";
import type { PciFunction } from "../../../src/pci/function.ts";
import { FakeFunction } from "../../kit/fake-function.ts";
import { rejection } from "../../kit/rejection.ts";

const MiB = 1 << 20;

/** Notes what is done, holds no function, and checks that every file is open as long as it is mapped. */
class FakeSpace implements AddressSpace {
  readonly open = unused;
  readonly revive = unused;
  readonly [Symbol.dispose] = () => {};
  readonly pageSize = 4096;
  ioRanges = [{ start: 0, end: 2 ** 46 - 1 }];
  readonly mapped = new Map<number, { size: number; ino: number; offset: number; fd: number }>();
  readonly log: string[] = [];
  failMap: (range: DmaRange) => boolean = () => false;
  failUnmap = false;
  delay = 0;

  async map(range: DmaRange, fd: number): Promise<void> {
    await Bun.sleep(this.delay);
    if (this.failMap(range)) throw new Error("no more mappings");
    for (const [iova, { size }] of this.mapped) {
      if (iova < range.iova + range.size && range.iova < iova + size) throw new Error("EEXIST");
    }
    this.mapped.set(range.iova, { size: range.size, ino: fileInfo(fd).ino, offset: range.offset, fd });
    this.log.push(`map ${range.iova / MiB}+${range.size / MiB}`);
  }

  async unmap(range: DmaRange): Promise<void> {
    const there = this.mapped.get(range.iova);
    if (there?.size !== range.size) throw new Error("ENOENT");
    expect(fileInfo(there.fd).ino).toBe(there.ino);
    if (this.failUnmap) throw new Error("EBUSY");
    this.mapped.delete(range.iova);
    this.log.push(`unmap ${range.iova / MiB}+${range.size / MiB}`);
  }

  async unmapIfThere(range: DmaRange): Promise<void> {
    await this.unmap(range);
  }

  async attach(_: PciFunction, mapped: readonly DmaRange[]): Promise<void> {
    this.log.push(`attach ${mapped.length}`);
  }

  async detach(_: PciFunction, mapped: readonly DmaRange[]): Promise<void> {
    this.log.push(`detach ${mapped.length}`);
  }

  adopt(): void {}
}

const files: OwnedFd[] = [];
const domains: DmaDomain[] = [];
afterEach(() => {
  for (const domain of domains.splice(0)) domain.abandon();
  for (const file of files.splice(0)) file[Symbol.dispose]();
  expect(liveFds()).toBe(0);
});

function setUp() {
  const space = new FakeSpace();
  const domain = new DmaDomain(space, { conflictTimeout: 100 });
  domains.push(domain);
  const file = newFile();
  /** MiB; at the same place of the file unless said. */
  const range = (at: number, size: number, offset = at, of = file): DmaRange => {
    const { dev, ino } = fileInfo(of);
    return { iova: at * MiB, size: size * MiB, offset: offset * MiB, file: { dev, ino } };
  };
  const claim = (owner: string, wanted: DmaRange, fd = file) => domain.claim(owner, wanted, fd);
  return { space, domain, file, range, claim };
}

function newFile(size = 64): number {
  const fd = memfd("memory", size * MiB);
  files.push(fd);
  return fd.number;
}

describe("claims", () => {
  test("the same range of two owners is mapped once and unmapped with the last", async () => {
    const { space, domain, range, claim } = setUp();
    await Promise.all([claim("a", range(0, 8)), claim("b", range(0, 8)), claim("a", range(0, 8))]);
    await domain.release("a", range(0, 8));
    expect(space.log).toEqual(["map 0+8"]);
    await domain.release("b", range(0, 8));
    expect(space.log).toEqual(["map 0+8", "unmap 0+8"]);
    expect(liveFds()).toBe(1);
  });

  test("owners that cut the same memory differently share what is mapped", async () => {
    const { space, domain, range, claim } = setUp();
    await claim("a", range(4, 4));
    await claim("b", range(0, 16));
    expect(space.log).toEqual(["map 4+4", "map 0+4", "map 8+8"]);
    expect(space.mapped.get(8 * MiB)?.offset).toBe(8 * MiB);
    await domain.release("a", range(4, 4));
    expect(space.log).toHaveLength(3);
    await domain.release("b", range(0, 16));
    expect(space.mapped.size).toBe(0);
  });

  test("all of an owner goes at once, the rest stays", async () => {
    const { space, domain, range, claim } = setUp();
    await claim("a", range(0, 4));
    await claim("a", range(8, 4));
    await claim("b", range(8, 4));
    await domain.releaseAll("a");
    expect([...space.mapped.keys()]).toEqual([8 * MiB]);
    expect(await rejection(domain.release("a", range(0, 4)))).toMatchObject({ code: "notFound" });
  });

  test("the file is held by the domain, whatever becomes of the fd that was lent", async () => {
    const { space, domain, range } = setUp();
    const lent = memfd("lent", MiB);
    const wanted = range(0, 1, 0, lent.number);
    await domain.claim("a", wanted, lent.number);
    lent[Symbol.dispose]();
    await domain.release("a", wanted);
    expect(space.mapped.size).toBe(0);
  });
});

describe("memory of the daemon's own", () => {
  test("is as high as it can be, in one range, beside what is there", async () => {
    const space = new FakeSpace();
    const top = 2 ** 46;
    const domain = new DmaDomain(space);
    using guest = memfd("guest", 4 * MiB);
    using own = memfd("own", 8192);
    const { dev, ino } = fileInfo(guest.number);
    await domain.claim("vm", { iova: top - MiB, size: MiB, offset: 0, file: { dev, ino } }, guest.number);
    const [first, second] = await Promise.all([
      domain.claimFree("a", 4096, own.number),
      domain.claimFree("b", 8192, own.number),
    ]);
    expect(first).toMatchObject({ iova: top - MiB - 4096, size: 4096, offset: 0 });
    expect(second.iova).toBe(top - MiB - 4096 - 8192);
    expect(domain.owners).toEqual(["vm", "a", "b"]);
    await domain.releaseAll("a");
    expect((await domain.claimFree("c", 4096, own.number)).iova).toBe(first.iova);
    domain.abandon();
  });

  test("lies where a number can say its end, or is refused", async () => {
    const space = new FakeSpace();
    const domain = new DmaDomain(space);
    using own = memfd("own", 8192);
    space.ioRanges = [
      { start: 0, end: 4095 },
      { start: 2 ** 40, end: Number.MAX_SAFE_INTEGER },
    ];
    expect((await domain.claimFree("a", 4096, own.number)).iova).toBe(2 ** 53 - 8192);
    space.ioRanges = [{ start: 0, end: 4095 }];
    expect(await rejection(domain.claimFree("b", 8192, own.number))).toMatchObject({ code: "iommuDomain" });
    expect(await rejection(domain.claimFree("b", 100, own.number))).toMatchObject({ code: "invalid" });
    domain.abandon();
  });
});

describe("refusals", () => {
  test("ranges that cannot be, by name", async () => {
    const { space, file, range, claim } = setUp();
    space.ioRanges = [
      { start: 0, end: 0xfedf_ffff },
      { start: 0xfef0_0000, end: 2 ** 40 },
    ];
    const good = range(0, 1);
    const refusals: [DmaRange, RegExp][] = [
      [{ ...good, size: 0 }, /0 bytes/],
      [{ ...good, iova: -4096 }, /not a range/],
      [{ ...good, iova: 2 ** 53 - 4096 }, /not a range/],
      [{ ...good, iova: 0x800 }, /multiples of 4096/],
      [{ ...good, offset: 0x200 }, /offset 0x200.*multiples of 4096/],
      [{ ...good, size: 0xfff }, /multiples of 4096/],
      [{ ...good, iova: 0xfede_0000, size: 0x200000 }, /\[0xfee00000, 0xfeefffff\]/],
      [{ ...good, iova: 2 ** 40 }, /IOMMU cannot map/],
      [range(0, 65), /ends at 68157440 of a file of 67108864/],
      [range(0, 1, 0, newFile()), /another file/],
    ];
    for (const [wanted, message] of refusals)
      expect((await rejection(claim("a", wanted, file))).message).toMatch(message);
    expect(space.log).toEqual([]);
  });

  test("a claim that fails in its middle leaves nothing mapped", async () => {
    const { space, range, claim } = setUp();
    await claim("a", range(4, 4));
    space.failMap = ({ iova }) => iova === 8 * MiB;
    expect((await rejection(claim("b", range(0, 16)))).message).toContain("no more mappings");
    expect([...space.mapped.keys()]).toEqual([4 * MiB]);
    expect(liveFds()).toBe(2);
  });

  test("memory that could not be unmapped is said to be, keeps its file, and is tried again", async () => {
    const { space, domain, range, claim } = setUp();
    await claim("a", range(0, 4));
    space.failUnmap = true;
    expect((await rejection(domain.release("a", range(0, 4)))).message).toMatch(/still reachable/);
    expect(liveFds()).toBe(2);
    expect(domain.snapshot().fds.size).toBe(1);
    const other = newFile();
    expect((await rejection(domain.claim("b", range(0, 4, 0, other), other))).message).toMatch(/still reachable/);
    space.failUnmap = false;
    await domain.claim("b", range(0, 4, 0, other), other);
    expect(space.mapped.get(0)?.ino).toBe(fileInfo(other).ino);
  });
});

describe("conflicts", () => {
  test("other memory at the same place waits until the first owner lets go", async () => {
    const { space, domain, range, claim } = setUp();
    await claim("old", range(0, 8));
    const other = newFile();
    const waiting = domain.claim("new", range(4, 8, 0, other), other);
    await claim("bystander", range(32, 4));
    await domain.releaseAll("old");
    await waiting;
    expect(space.log).toEqual(["map 0+8", "map 32+4", "unmap 0+8", "map 4+8"]);
  });

  test("or is refused at the deadline, naming who has it", async () => {
    const { domain, range, claim } = setUp();
    await claim("first", range(0, 8));
    const other = newFile();
    const refused = domain.claim("second", range(4, 8, 0, other), other);
    expect(await rejection(refused)).toMatchObject({
      code: "iommuDomain",
      message: expect.stringMatching(/which first has from another file/),
      fix: expect.stringMatching(/UUID/),
    });
    expect((await rejection(claim("third", range(0, 4, 16)))).message).toMatch(/first/);
  });

  test("a claim that waits is given up when it is released", async () => {
    const { domain, range, claim } = setUp();
    await claim("first", range(0, 8));
    const other = newFile();
    const wanted = range(0, 8, 0, other);
    const one = domain.claim("second", wanted, other);
    await Bun.sleep(1);
    await domain.release("second", wanted);
    expect(await rejection(one)).toMatchObject({ code: "cancelled" });
    const two = domain.claim("second", wanted, other);
    await domain.releaseAll("second");
    expect(await rejection(two)).toMatchObject({ code: "cancelled" });
    await domain.releaseAll("first");
    expect(liveFds()).toBe(2);
  });

  test("a release during a claim takes back what was claimed", async () => {
    const { space, domain, range, claim } = setUp();
    space.delay = 5;
    const claimed = claim("a", range(0, 8));
    await Bun.sleep(1);
    await Promise.all([claimed, domain.releaseAll("a")]);
    expect(space.log).toEqual(["map 0+8", "unmap 0+8"]);
  });
});

test("functions come and go with all that is mapped", async () => {
  const { space, domain, range, claim } = setUp();
  const fn = new FakeFunction();
  await claim("a", range(0, 4));
  await domain.attach(fn);
  await claim("a", range(8, 4));
  await domain.detach(fn);
  expect(space.log).toEqual(["map 0+4", "attach 1", "map 8+4", "detach 2"]);
});

test("a domain made from record and fds goes on without mapping anything", async () => {
  const { space, domain, range, claim } = setUp();
  await claim("a", range(0, 4));
  await claim("b", range(0, 8));
  const { data, fds } = domain.snapshot();
  const record = JSON.parse(JSON.stringify(data));
  const copies = () => new Map([...fds].map(([name, number]) => [name, duplicate(number)]));
  const own = copies();

  expect(() => DmaDomain.revive(() => space, { mapped: 1 }, copies())).toThrow(/not understood/);
  expect(() => DmaDomain.revive(() => space, record, new Map())).toThrow(/memory.0/);
  const swapped = copies();
  swapped.get("memory.0")?.[Symbol.dispose]();
  swapped.set("memory.0", duplicate(newFile()));
  expect(() => DmaDomain.revive(() => space, record, swapped)).toThrow(/another file/);

  domain.abandon();
  const revived = DmaDomain.revive(() => space, record, own);
  domains.push(revived);
  expect(space.log).toEqual(["map 0+4", "map 4+4"]);
  // The fake notes our fd numbers; those of the first domain are closed.
  for (const [iova, entry] of space.mapped) entry.fd = own.get(`memory.${iova === 0 ? 0 : 1}`)?.number ?? -1;
  await revived.releaseAll("b");
  await revived.release("a", range(0, 4));
  expect(space.log).toEqual(["map 0+4", "map 4+4", "unmap 4+4", "unmap 0+4"]);
});

/** The domain under test passes these on; nothing here has functions to open. */
function unused(): never {
  throw new Error("opens no functions");
}

test("a claim that is being mapped ends when it is given up, and a release tries what a failed map has left", async () => {
  const file = memfd("guest", MiB);
  files.push(file);
  const { dev, ino } = fileInfo(file.number);
  const range: DmaRange = { iova: 0, size: MiB, file: { dev, ino }, offset: 0 };
  const began = Promise.withResolvers<void>();
  const space = new FakeSpace();
  let left = true;
  const slow: AddressSpace = Object.assign(space, {
    map: async (_range: DmaRange, _fd: number, _deadline: unknown, cancelled = () => false) => {
      began.resolve();
      while (!cancelled()) await Bun.sleep(1);
      throw new Error("not wanted any more");
    },
    settle: async () => {
      if (left) throw new Error("left of a map");
    },
  });
  const domain = new DmaDomain(slow);
  domains.push(domain);
  const claimed = rejection(domain.claim("a", range, file.number));
  await began.promise;
  domain.giveUp("a");
  expect((await claimed).message).toBe("not wanted any more; left of a map");
  expect((await rejection(domain.releaseAll("a"))).message).toBe("left of a map");
  left = false;
  await domain.releaseAll("a");
});
