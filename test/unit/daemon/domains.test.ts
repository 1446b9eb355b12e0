import { afterEach, expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { DomainTable } from "../../../src/daemon/domains.ts";
import { VfMemory } from "../../../src/daemon/vf-memory.ts";
import { liveFds } from "../../../src/native/fd.ts";
import { fileInfo, memfd } from "../../../src/native/sys.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import type { DmaRange, StoredSpace } from "../../../src/pci/address-space.ts";
import { FakeDma } from "../../kit/fake-dma.ts";
import { MemoryKeeper } from "../../kit/memory-keeper.ts";
import { rejection } from "../../kit/rejection.ts";

const VM = "11111111-1111-4111-8111-111111111111";
const VF = parsePciAddress("0000:5a:00.1");
const soon = () => Deadline.after(2000, "the test");

afterEach(() => expect(liveFds()).toBe(0));

/** A table, and the spaces that it has made. */
class Lab implements Disposable {
  readonly keeper = new MemoryKeeper();
  readonly file = memfd("guest", 4096);
  readonly spaces: FakeDma[] = [];
  readonly stored: (StoredSpace | undefined)[] = [];
  /** Left out for a space of which nothing is kept. */
  kept: { data: string; fds: Map<string, number> } | undefined;
  table = this.make();

  make(): DomainTable {
    return new DomainTable(this.keeper, (_kind, _owner, stored) => {
      this.stored.push(stored);
      for (const fd of stored?.fds.values() ?? []) fd[Symbol.dispose]();
      const space = Object.assign(new FakeDma(), { snapshot: () => this.kept, adoptedAll: () => {} });
      this.spaces.push(space);
      return space;
    });
  }

  get range(): DmaRange {
    const { dev, ino } = fileInfo(this.file.number);
    return { iova: 0, size: 4096, offset: 0, file: { dev, ino } };
  }

  /** Another process: nothing of the first is there. */
  async next(): Promise<DomainTable> {
    this.table.abandon();
    this.table = this.make();
    for (const key of await this.keeper.list()) {
      const { record, fds } = (await this.keeper.get(key))!;
      this.table.revive(record, fds);
    }
    return this.table;
  }

  [Symbol.dispose](): void {
    this.table.abandon();
    for (const one of [this.keeper, this.file]) one[Symbol.dispose]();
  }
}

test("a domain of which nothing is kept has a record from the first memory in it, as long as it is used", async () => {
  using lab = new Lab();
  const memory = new VfMemory(VF, lab.table.acquire(VM, "vfio-user"));
  expect(lab.keeper.keys).toEqual([]);
  await memory.map(lab.range, lab.file.number);
  expect(lab.keeper.keys).toEqual([`domain/vfio-user/${VM}`]);
  await memory.unmap(lab.range);
  await memory.unmap(lab.range);
  expect(lab.keeper.keys).toEqual([`domain/vfio-user/${VM}`]);
  await lab.table.release(VM, "vfio-user");
  expect(lab.keeper.keys).toEqual([]);
});

test("one whose address space is kept has a record as long as it is used, which is handed on", async () => {
  using lab = new Lab();
  using container = memfd("container", 4096);
  lab.kept = { data: "ids", fds: new Map([["container", container.number]]) };
  for (let users = 0; users < 2; users++) lab.table.acquire(VM, "vfio");
  await lab.table.release(VM, "vfio");
  expect(lab.keeper.keys).toEqual([`domain/vfio/${VM}`]);
  const next = await lab.next();
  expect(lab.stored.at(-1)).toMatchObject({ data: "ids" });
  next.acquire(VM, "vfio");
  await next.takeUp(soon());
  await next.prune(new Set());
  expect(lab.keeper.keys).toEqual([`domain/vfio/${VM}`]);
  await next.release(VM, "vfio");
  expect(lab.keeper.keys).toEqual([]);
});

test("after an adoption memory of owners that are gone is let go", async () => {
  using lab = new Lab();
  const memory = new VfMemory(VF, lab.table.acquire(VM, "vfio-user"));
  await memory.map(lab.range, lab.file.number);
  const next = await lab.next();
  const domain = next.acquire(VM, "vfio-user");
  await next.takeUp(soon());
  expect(domain.owners).toEqual([VF]);
  await next.prune(new Set());
  expect(domain.owners).toEqual([]);
  await next.release(VM, "vfio-user");
  expect(lab.keeper.keys).toEqual([]);
});

test("memory is not mapped where the keeper does not store it", async () => {
  using lab = new Lab();
  const memory = new VfMemory(VF, lab.table.acquire(VM, "vfio-user"));
  lab.keeper.refused = "domain/";
  expect(await rejection(memory.map(lab.range, lab.file.number))).toMatchObject({ code: "keeperStore" });
  expect(lab.spaces[0]!.files).toEqual([]);
  lab.keeper.refused = undefined;
  await memory.map(lab.range, lab.file.number);
  await lab.table.checkpointAll();
  expect(lab.spaces[0]!.files.length).toBe(1);
  await lab.table.release(VM, "vfio-user");
});
