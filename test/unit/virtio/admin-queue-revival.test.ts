import { describe, expect, test } from "bun:test";
import { OwnedFd } from "../../../src/native/fd.ts";
import { AdminMemory } from "../../../src/virtio/admin/admin-memory.ts";
import { AdminQueue } from "../../../src/virtio/admin/admin-queue.ts";
import { type AdminQueueRecord, parseAdminQueueRecord } from "../../../src/virtio/admin/admin-record.ts";
import { VendorAdmin } from "../../../src/virtio/admin/vendor-admin.ts";
import { VirtioPciDevice } from "../../../src/virtio/pci-device.ts";
import type { FakeAdmin, FakeAnswer } from "../../kit/fake-admin.ts";
import { rejection } from "../../kit/rejection.ts";
import { cleanUpAfterEach, open, soon, undo, until } from "./admin-lab.ts";

cleanUpAfterEach();

describe("revival", () => {
  /** What a daemon leaves behind that dies with two commands in flight. */
  async function crashed() {
    const { fake, admin } = await open();
    const held: (() => void)[] = [];
    fake.answer = (command) => new Promise<FakeAnswer>((resolve) => held.push(() => resolve(fake.honest(command))));
    const cut = Promise.allSettled([admin.status(1, soon()), admin.status(2, soon())]);
    const { data, fds } = admin.queue.snapshot();
    const copies = new Map([...fds].map(([name, number]) => [name, dup(number)]));
    admin.queue.abandon();
    expect((await cut).map(({ status }) => status)).toEqual(["rejected", "rejected"]);
    const device = await VirtioPciDevice.probe(fake.fn, soon());
    fake.fn.statusWrites.length = 0;
    return { fake, device, held, record: JSON.parse(JSON.stringify(data)), fds: copies };
  }

  test("waits for what is in flight before it says anything", async () => {
    const { fake, device, held, record, fds } = await crashed();
    const queue = AdminQueue.revive(device, record, fds);
    undo.push(queue);
    const admin = new VendorAdmin(queue);
    expect(queue.state).toEqual({ kind: "draining" });
    const asked = admin.status(2, soon());
    await Bun.sleep(5);
    expect(fake.commands("getStatus").length).toBe(2);
    fake.answer = (command) => fake.honest(command);
    for (const release of held.reverse()) release();
    expect(await asked).toBe("init");
    expect(queue.state).toEqual({ kind: "ready" });
    expect(fake.fn.statusWrites).toEqual([]);
  });

  test("a command that was published and not announced is announced", async () => {
    const { fake, admin } = await open();
    const { onRing } = fake.fn;
    fake.fn.onRing = () => {};
    const cut = admin.modify(1, "quiesced", soon()).catch(() => {});
    const { data, fds } = admin.queue.snapshot();
    const copies = new Map([...fds].map(([name, number]) => [name, dup(number)]));
    admin.queue.abandon();
    await cut;
    fake.fn.onRing = onRing;
    const queue = AdminQueue.revive(await VirtioPciDevice.probe(fake.fn, soon()), data, copies);
    undo.push(queue);
    expect(await new VendorAdmin(queue).status(1, soon())).toBe("quiesced");
  });

  test("a command that was noted and not yet made available was never given to the device", async () => {
    const { fake, admin } = await open();
    fake.fn.onRing = () => {};
    const cut = admin.modify(1, "quiesced", soon()).catch(() => {});
    const { record, copies, memory } = leave(admin);
    await cut;
    const { driver } = memory.ringPlaces;
    memory.writeU16(driver + 2, memory.readU16(driver + 2) - 1);
    memory[Symbol.dispose]();
    const revived = await revive(fake, record, copies);
    expect(revived.queue.state).toEqual({ kind: "ready" });
    fake.fn.onRing = () => fake.serve();
    expect(await revived.status(1, soon())).toBe("init");
    expect(fake.commands("modifyStatus")).toEqual([]);
  });

  test("what was never answered is not waited for again, and comes back", async () => {
    const { fake, admin } = await open();
    fake.answer = (command) => (command.name === "modifyStatus" ? "silence" : fake.honest(command));
    expect(await rejection(admin.modify(1, "quiesced", soon(20)))).toMatchObject({ code: "quiesceFailed" });
    const { record, copies, memory } = leave(admin);
    memory[Symbol.dispose]();
    const revived = await revive(fake, record, copies);
    expect(revived.queue.state).toEqual({ kind: "ready" });
    expect(await revived.status(1, soon())).toBe("init");
    fake.answer = (command) => fake.honest(command);
    expect(await rejection(revived.modify(1, "quiesced", soon()))).toMatchObject({ code: "busy" });
    fake.complete(fake.commands("modifyStatus")[0]!.head);
    await until(() => revived.obstacle(1) === undefined);
    await revived.modify(1, "quiesced", soon());
  });

  test("what does not end in time is lost; a sign of life decides about the queue", async () => {
    const { fake, device, record, fds } = await crashed();
    fake.answer = (command) => fake.honest(command);
    const queue = AdminQueue.revive(device, record, fds, { drain: 30 });
    undo.push(queue);
    const admin = new VendorAdmin(queue);
    expect((await rejection(admin.status(1, soon(10)))).message).toMatch(
      /commands of an earlier process are in flight/,
    );
    expect(await admin.status(1, soon())).toBe("init");
    await until(() => fake.commands("identity").length === 2);
    expect(queue.state).toEqual({ kind: "ready" });
  });

  test("one that gives no sign of life is dead, at once known to the next daemon", async () => {
    const { device, record, fds } = await crashed();
    const queue = AdminQueue.revive(device, record, fds, { drain: 30, lifeSign: 50 });
    undo.push(queue);
    const waiting = new VendorAdmin(queue).status(1, soon());
    expect(await rejection(waiting)).toMatchObject({
      code: "adminQueue",
      message: expect.stringMatching(/nothing any/),
    });
    const snapshot = queue.snapshot();
    const copies = new Map([...snapshot.fds].map(([name, number]) => [name, dup(number)]));
    const next = AdminQueue.revive(device, snapshot.data, copies);
    undo.push(next);
    expect(next.state).toMatchObject({ kind: "dead", reason: expect.stringMatching(/nothing any/) });
  });

  test.each([
    ["an index that jumped", (memory: AdminMemory) => memory.writeU16(memory.ringPlaces.driver + 2, 77), /index 77/],
    [
      "a slot too many",
      (memory: AdminMemory) => memory.write(memory.ringPlaces.journal + 4, Uint8Array.of(1)),
      /1 comm/,
    ],
    [
      "a kind of slot",
      (memory: AdminMemory) => memory.write(memory.ringPlaces.journal + 8, Uint8Array.of(9)),
      /says 9/,
    ],
  ])("memory that contradicts itself makes it a dead queue: %s", async (_, bend, reason) => {
    const { fake, admin } = await open();
    await admin.status(1, soon());
    const { record, copies, memory } = leave(admin);
    bend(memory);
    memory[Symbol.dispose]();
    const { queue } = await revive(fake, record, copies);
    expect(queue.state).toMatchObject({ kind: "dead", reason: expect.stringMatching(reason) });
  });

  test("a record that does not fit is refused and its fds closed", async () => {
    const { device, record, fds } = await crashed();
    const copies = () => new Map([...fds].map(([name, fd]) => [name, fd.dup()]));
    expect(() => AdminQueue.revive(device, { ...record, ringSize: 100 }, copies())).toThrow(/ring of 100/);
    expect(() => AdminQueue.revive(device, { ...record, iova: -1 }, copies())).toThrow(/not understood/);
    expect(() => AdminQueue.revive(device, record, new Map())).toThrow(/lacks its memory/);
    expect(() => AdminQueue.revive(device, record, copies().set("other", dup(fds.get("memory")!.number)))).toThrow(
      /spare/,
    );
    const swapped = copies();
    const [memory, interrupt] = [swapped.get("memory")!, swapped.get("interrupt")!];
    expect(() => AdminQueue.revive(device, record, swapped.set("memory", interrupt).set("interrupt", memory))).toThrow(
      /no memory file/,
    );
    for (const fd of fds.values()) fd[Symbol.dispose]();
  });
});

/** The queue as a daemon leaves it behind that dies, and its memory as the device's process may write to it. */
function leave({ queue }: VendorAdmin) {
  const { data, fds } = queue.snapshot();
  const copies = new Map([...fds].map(([name, number]) => [name, dup(number)]));
  const record = parseAdminQueueRecord(JSON.parse(JSON.stringify(data)));
  const memory = AdminMemory.revive(copies.get("memory")!.dup(), record.iova, record.ringSize);
  queue.abandon();
  return { record, copies, memory };
}

async function revive(fake: FakeAdmin, record: AdminQueueRecord, fds: Map<string, OwnedFd>): Promise<VendorAdmin> {
  const queue = AdminQueue.revive(await VirtioPciDevice.probe(fake.fn, soon()), record, fds);
  undo.push(queue);
  return new VendorAdmin(queue);
}

function dup(number: number): OwnedFd {
  const borrowed = new OwnedFd(number);
  const copy = borrowed.dup();
  borrowed.release();
  return copy;
}
