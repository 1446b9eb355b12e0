import { afterEach, describe, expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { VfMemory } from "../../../src/daemon/vf-memory.ts";
import { duplicate, liveFds } from "../../../src/native/fd.ts";
import { fileInfo, memfd } from "../../../src/native/sys.ts";
import { type PciAddress, parsePciAddress } from "../../../src/pci/address.ts";
import type { AddressSpace, DmaRange, StoredSpace } from "../../../src/pci/address-space.ts";
import type { BusEntry } from "../../../src/pci/bus.ts";
import { DmaDomain } from "../../../src/pci/dma-domain.ts";
import type { PciFunction } from "../../../src/pci/function.ts";
import { FakeFunction } from "../../kit/fake-function.ts";
import { MemoryKeeper } from "../../kit/memory-keeper.ts";
import { rejection } from "../../kit/rejection.ts";

const MiB = 1 << 20;
const KEY = "domain";
const A = parsePciAddress("0000:5a:00.1");
const B = parsePciAddress("0000:5a:00.2");
const soon = () => Deadline.after(2000, "the test");

afterEach(() => expect(liveFds()).toBe(0));

/** One process: killed after so many steps, from where on nothing in it ends any more. */
class Life {
  private readonly death = Promise.withResolvers<false>();
  private steps = 0;
  private over = false;

  constructor(readonly last = Number.POSITIVE_INFINITY) {}

  async step<T>(work: () => T | Promise<T>): Promise<T> {
    if (!this.over) {
      const result = await work();
      if (++this.steps < this.last) return result;
      this.over = true;
      this.death.resolve(false);
    }
    return await new Promise<never>(() => {});
  }

  /** Whether the process lives to see the end of it. */
  sees(work: Promise<unknown>): Promise<boolean> {
    return Promise.race([work.then(() => true), this.death.promise]);
  }
}

/** A VM of two VFs and their functions, which outlive the daemon where a record has them. */
class Lab implements Disposable {
  readonly file = memfd("guest", 64 * MiB);
  readonly keeper = new MemoryKeeper();
  /** Those that the record of a VF has. */
  readonly recorded = new Set<PciFunction>();
  readonly first = new FakeFunction();
  readonly second = new FakeFunction();
  /** What each function has mapped: size by place. */
  readonly tables = new Map<PciFunction, Map<number, number>>([this.first, this.second].map((fn) => [fn, new Map()]));
  life = new Life();
  domain = new DmaDomain(new Space(this), this.options());
  /** Notes that fail, by how many come before them. */
  failing = new Set<number>();
  /** Ranges of the last record. */
  private known: readonly { readonly iova: number; readonly size: number }[] = [];

  /** The process is no more, and another one takes up what it has left. @returns false where that is killed, too */
  async restart(life = new Life()): Promise<boolean> {
    this.domain.abandon();
    this.life = life;
    for (const [fn, table] of this.tables) if (!this.recorded.has(fn)) table.clear();
    const stored = await this.keeper.get(KEY);
    if (stored === undefined) return true;
    this.domain = DmaDomain.revive(() => new Space(this), stored.record, stored.fds, this.options());
    for (const fn of this.recorded)
      this.domain.reviveFunction({ address: fn.address } as BusEntry, [...this.tables.keys()].indexOf(fn), new Map());
    return await life.sees(this.domain.takeUp(soon()));
  }

  range(at: number, size: number): DmaRange {
    const { dev, ino } = fileInfo(this.file.number);
    return { iova: at * MiB, size: size * MiB, offset: at * MiB, file: { dev, ino } };
  }

  memory(owner: PciAddress): VfMemory {
    return new VfMemory(owner, this.domain);
  }

  map(owner: PciAddress, at: number, size: number): Promise<void> {
    return this.memory(owner).map(this.range(at, size), this.file.number);
  }

  async attach(...functions: PciFunction[]): Promise<void> {
    for (const fn of functions) {
      await this.domain.attach(fn);
      this.recorded.add(fn);
    }
  }

  /** MiB, ascending. */
  mapped(fn: PciFunction): string[] {
    const table = [...this.tables.get(fn)!].sort(([a], [b]) => a - b);
    return table.map(([iova, size]) => `${iova / MiB}+${size / MiB}`);
  }

  /** What lives on with a function is known to the record. */
  check(fn: PciFunction): void {
    if (!this.recorded.has(fn)) return;
    for (const [iova, size] of this.tables.get(fn)!) {
      expect(this.known).toContainEqual(expect.objectContaining({ iova, size }));
    }
  }

  [Symbol.dispose](): void {
    this.domain.abandon();
    this.keeper[Symbol.dispose]();
    this.file[Symbol.dispose]();
  }

  private options() {
    let notes = 0;
    const note = () =>
      this.life.step(async () => {
        if (this.failing.has(notes++)) throw new Error("not stored");
        const { data, fds } = this.domain.snapshot();
        await this.keeper.put(KEY, () => ({ record: data, fds }));
        this.known = (data as { mapped: { iova: number; size: number }[] }).mapped;
      });
    return { note };
  }
}

/** Tells each function of every range, as vfio-user servers are told; each is strict. */
class Space implements AddressSpace {
  readonly ioRanges = [{ start: 0, end: 2 ** 40 - 1 }];
  readonly pageSize = 4096;
  private readonly functions = new Set<PciFunction>();

  constructor(private readonly lab: Lab) {}

  open(): never {
    throw new Error("opens no functions");
  }

  revive(_: BusEntry, data: unknown): PciFunction {
    return [...this.lab.tables.keys()][data as number]!;
  }

  adopt(fn: PciFunction): void {
    this.functions.add(fn);
  }

  async map(range: DmaRange): Promise<void> {
    for (const fn of this.functions) await this.mapOne(fn, range);
  }

  async unmap({ iova, size }: DmaRange): Promise<void> {
    for (const fn of this.functions) {
      await this.change(fn, (table) => {
        if (table.get(iova) !== size) throw new Error("ENOENT");
        table.delete(iova);
      });
    }
  }

  async unmapIfThere({ iova }: DmaRange): Promise<void> {
    for (const fn of this.functions) await this.change(fn, (table) => table.delete(iova));
  }

  async attach(fn: PciFunction, mapped: readonly DmaRange[]): Promise<void> {
    for (const range of mapped) await this.mapOne(fn, range);
    this.functions.add(fn);
  }

  async detach(fn: PciFunction, mapped: readonly DmaRange[]): Promise<void> {
    this.functions.delete(fn);
    for (const { iova } of mapped) await this.change(fn, (table) => table.delete(iova));
  }

  [Symbol.dispose](): void {}

  private mapOne(fn: PciFunction, { iova, size }: DmaRange): Promise<void> {
    return this.change(fn, (table) => {
      if ([...table].some(([other, length]) => other < iova + size && iova < other + length)) throw new Error("EEXIST");
      table.set(iova, size);
    });
  }

  private change(fn: PciFunction, how: (table: Map<number, number>) => unknown): Promise<void> {
    return this.lab.life.step(() => {
      how(this.lab.tables.get(fn)!);
      this.lab.check(fn);
    });
  }
}

interface Operation {
  readonly prepare: (lab: Lab) => Promise<void>;
  /** As whoever asks for it does, also a second time. */
  readonly run: (lab: Lab) => Promise<void>;
  /** What the first function has then, and the second one. */
  readonly wanted: readonly [string[], string[]];
  /** Notes that it needs. */
  readonly notes: number;
}

const OPERATIONS: Record<string, Operation> = {
  "a claim of what is there in part": {
    prepare: async (lab) => {
      await lab.attach(lab.first, lab.second);
      await lab.map(B, 8, 4);
    },
    run: (lab) => lab.map(A, 0, 16),
    wanted: [
      ["0+8", "8+4", "12+4"],
      ["0+8", "8+4", "12+4"],
    ],
    notes: 2,
  },
  "a claim of what is there": {
    prepare: async (lab) => {
      await lab.attach(lab.first, lab.second);
      await lab.map(B, 8, 4);
    },
    run: (lab) => lab.map(A, 8, 4),
    wanted: [["8+4"], ["8+4"]],
    notes: 1,
  },
  "a release": {
    prepare: async (lab) => {
      await lab.attach(lab.first, lab.second);
      await lab.map(A, 0, 4);
      await lab.map(A, 8, 4);
      await lab.map(B, 8, 4);
    },
    run: (lab) => lab.memory(A).unmap(lab.range(0, 4)),
    wanted: [["8+4"], ["8+4"]],
    notes: 2,
  },
  "a release of all": {
    prepare: async (lab) => {
      await lab.attach(lab.first, lab.second);
      for (const at of [0, 4, 8]) await lab.map(A, at, 4);
      await lab.map(B, 8, 4);
    },
    run: (lab) => lab.memory(A).clear(),
    wanted: [["8+4"], ["8+4"]],
    notes: 2,
  },
  "a claim of the daemon's own": {
    prepare: async (lab) => {
      await lab.attach(lab.first, lab.second);
      await lab.map(A, 0, 4);
    },
    run: async (lab) => {
      if (!lab.domain.owners.includes("own")) await lab.domain.claimFree("own", MiB, lab.file.number);
    },
    wanted: [
      ["0+4", `${2 ** 20 - 1}+1`],
      ["0+4", `${2 ** 20 - 1}+1`],
    ],
    notes: 2,
  },
  "an attach": {
    prepare: async (lab) => {
      await lab.attach(lab.first);
      for (const at of [0, 8]) await lab.map(A, at, 4);
    },
    run: async (lab) => {
      if (!lab.recorded.has(lab.second)) await lab.attach(lab.second);
    },
    wanted: [
      ["0+4", "8+4"],
      ["0+4", "8+4"],
    ],
    notes: 0,
  },
  "a detach": {
    prepare: async (lab) => {
      await lab.attach(lab.first, lab.second);
      for (const at of [0, 8]) await lab.map(A, at, 4);
    },
    // Its record goes before.
    run: async (lab) => {
      if (lab.recorded.delete(lab.second)) await lab.domain.detach(lab.second);
    },
    wanted: [["0+4", "8+4"], []],
    notes: 0,
  },
};

describe("killed after each step of", () => {
  for (const [name, { prepare, run, wanted, notes }] of Object.entries(OPERATIONS)) {
    test(`${name}, and again while that is taken up, all is mapped once it is done again`, async () => {
      let kills = 1;
      for (let isDone = false; !isDone; kills++) {
        for (const [again, isLast] of [
          [1, false],
          [2, false],
          [3, false],
          [Number.POSITIVE_INFINITY, true],
        ] as const) {
          using lab = new Lab();
          await prepare(lab);
          const before = lab.keeper.writes;
          lab.life = new Life(kills);
          const ended = await lab.life.sees(run(lab));
          if (ended) expect(lab.keeper.writes - before).toBe(notes);
          isDone = ended && isLast;
          await lab.restart(new Life(again));
          await lab.restart();
          await run(lab);
          expect([lab.mapped(lab.first), lab.mapped(lab.second)]).toEqual([...wanted]);
        }
      }
      expect(kills).toBeGreaterThan(2);
    });
  }
});

describe("a note that fails", () => {
  for (const which of [0, 1]) {
    test(`${which === 0 ? "before" : "after"} a map leaves nothing mapped, and is reported`, async () => {
      using lab = new Lab();
      await lab.attach(lab.first);
      lab.failing = new Set([which]);
      expect((await rejection(lab.map(A, 0, 4))).message).toBe("not stored");
      expect(lab.mapped(lab.first)).toEqual([]);
      expect(lab.domain.owners).toEqual([]);
      await lab.map(A, 0, 4);
      expect(lab.mapped(lab.first)).toEqual(["0+4"]);
    });
  }

  test("before an unmap leaves it mapped, for the next change", async () => {
    using lab = new Lab();
    await lab.attach(lab.first);
    await lab.map(A, 0, 4);
    lab.failing = new Set([2]);
    expect((await rejection(lab.memory(A).clear())).message).toBe("not stored");
    expect(lab.mapped(lab.first)).toEqual(["0+4"]);
    await lab.memory(A).clear();
    expect(lab.mapped(lab.first)).toEqual([]);
  });

  test("with each of a claim and its undoing leaves nothing mapped that a record does not know", async () => {
    using lab = new Lab();
    await lab.attach(lab.first);
    lab.failing = new Set([1, 2, 3, 4]);
    await rejection(lab.map(A, 0, 4));
    expect(lab.mapped(lab.first)).toEqual([]);
    lab.failing.clear();
    await lab.restart();
    await lab.map(B, 0, 8);
    expect(lab.mapped(lab.first)).toEqual(["0+8"]);
  });
});

test("what is kept of the address space goes with the record, also where nothing is mapped", async () => {
  using lab = new Lab();
  using container = memfd("container", 4096);
  const space = Object.assign(new Space(lab), {
    snapshot: () => ({ data: { ioas: 3 }, fds: new Map([["container", container.number]]) }),
  });
  const domain = new DmaDomain(space);
  expect(domain.isEmpty).toBe(false);
  const { data, fds } = domain.snapshot();
  expect([...fds]).toEqual([["space.container", container.number]]);
  const copies = () => new Map([...fds].map(([name, fd]) => [name, duplicate(fd)]));
  const seen: StoredSpace[] = [];
  const revived = DmaDomain.revive(
    (stored) => {
      if (stored !== undefined) seen.push(stored);
      return space;
    },
    data,
    copies(),
  );
  expect(seen.map((stored) => [stored.data, [...stored.fds.keys()]])).toEqual([[{ ioas: 3 }, ["container"]]]);
  for (const fd of seen[0]!.fds.values()) fd[Symbol.dispose]();
  expect(revived.isEmpty).toBe(false);
  expect(() => DmaDomain.revive(() => space, { mapped: [], claims: [] }, copies())).toThrow(/no address space/);
});

test("a function that was not told of a change cannot be taken up any more", async () => {
  using lab = new Lab();
  await lab.attach(lab.first, lab.second);
  await lab.map(A, 0, 4);
  lab.recorded.delete(lab.second);
  await lab.restart();
  await lab.map(A, 8, 4);
  using socket = memfd("socket", 4096);
  const fds = new Map([["socket", duplicate(socket.number)]]);
  expect(() => lab.domain.reviveFunction({ address: B } as BusEntry, 1, fds)).toThrow(
    /has changed before 0000:5a:00.2/,
  );
  expect(fds.get("socket")?.closed).toBe(true);
});
