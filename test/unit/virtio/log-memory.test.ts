import { describe, expect, test } from "bun:test";
import { memfd, truncate } from "../../../src/native/sys.ts";
import { DmaDomain } from "../../../src/pci/dma-domain.ts";
import { LogMemory } from "../../../src/virtio/admin/log-memory.ts";
import { FakeDma } from "../../kit/fake-dma.ts";
import { rejection } from "../../kit/rejection.ts";
import { cleanUpAfterEach, disposeLater, soon } from "./vendor-lab.ts";

cleanUpAfterEach();

function make(note?: () => Promise<void>) {
  const dma = new FakeDma();
  const domain = new DmaDomain(dma, { note });
  disposeLater({ [Symbol.asyncDispose]: async () => domain.abandon() });
  const file = memfd("log", 3 * 4096);
  disposeLater({ [Symbol.asyncDispose]: async () => file[Symbol.dispose]() });
  return { dma, domain, file, memory: new LogMemory(domain) };
}

describe("a log", () => {
  test("that ends inside a page is mapped with all of it, and from where it begins", async () => {
    const { dma, file, memory } = make();
    truncate(file.number, 4096 + 24);
    const { address, release } = await memory.share({ fd: file.number, offset: 4096, size: 24 });
    dma.write(address + 23, Uint8Array.of(9));
    const bytes = await Bun.file(`/proc/self/fd/${file.number}`).bytes();
    expect([bytes.length, bytes.at(-1)]).toEqual([4096 + 24, 9]);
    await release();
    await release();
    expect(dma.files.length).toBe(0);
  });

  test("is one with another only where file, place and size are", async () => {
    const { dma, domain, file, memory } = make();
    const share = (offset: number, size: number) => memory.share({ fd: file.number, offset, size });
    const [a, b, c, d] = await Promise.all([share(0, 4096), share(0, 4096), share(4096, 4096), share(0, 8192)]);
    expect(a.address).toBe(b.address);
    expect(new Set([a.address, c.address, d.address]).size).toBe(3);
    expect(dma.files.length).toBe(3);
    for (const { release } of [a, c, d]) await release();
    expect(dma.files.length).toBe(1);
    // The last user goes while the next one comes.
    const [again] = await Promise.all([share(0, 4096), b.release()]);
    expect(dma.files.length).toBe(1);
    await again.release();
    expect(domain.owners).toEqual([]);
  });

  test("that cannot be mapped is nobody's, and can be tried again", async () => {
    const { dma, domain, file, memory } = make();
    const { map } = dma;
    dma.map = () => Promise.reject(new Error("no more mappings"));
    const log = { fd: file.number, offset: 0, size: 4096 };
    const failures = await Promise.all([rejection(memory.share(log)), rejection(memory.share(log))]);
    expect(failures.map(({ message }) => message)).toEqual(["no more mappings", "no more mappings"]);
    expect(domain.owners).toEqual([]);
    dma.map = map;
    await (await memory.share(log)).release();
    expect(dma.files.length).toBe(0);
  });

  test("is not mapped where that cannot be noted down", async () => {
    let writes = 0;
    const { dma, memory, file } = make(async () => {
      if (++writes === 1) throw new Error("the keeper does not store it");
    });
    const log = { fd: file.number, offset: 0, size: 4096 };
    expect((await rejection(memory.share(log))).message).toMatch(/does not store/);
    expect((await rejection(make(() => Promise.reject(new Error("no"))).memory.own(64))).message).toBe("no");
    expect(dma.files.length).toBe(0);
  });
});

test("what an earlier process left is unmapped once nothing marks there, before anything new is mapped", async () => {
  const { dma, domain, file, memory } = make();
  await memory.share({ fd: file.number, offset: 0, size: 4096 });
  await domain.claimFree("admin queue", 4096, file.number);
  const next = new LogMemory(domain);
  expect(next.hasLeft).toBe(true);
  const quiet = Promise.withResolvers<void>();
  const cleaned = next.clean(quiet.promise);
  const own = next.own(64);
  await Bun.sleep(2);
  expect(dma.files.length).toBe(2);
  quiet.resolve();
  await soon().race(cleaned);
  const { address, release } = await soon().race(own);
  expect(dma.read(address, 64)).toEqual(new Uint8Array(64));
  expect(dma.files.length).toBe(2);
  await release();
  expect(domain.owners).toEqual(["admin queue"]);
  expect(new LogMemory(domain).hasLeft).toBe(false);
});

test("where the device does not say that it is quiet, what was left stays, and new memory has another place", async () => {
  const { dma, domain, file, memory } = make();
  await memory.share({ fd: file.number, offset: 0, size: 4096 });
  const next = new LogMemory(domain);
  expect((await rejection(next.clean(Promise.reject(new Error("no answer"))))).message).toBe("no answer");
  const { release } = await next.own(64);
  expect(dma.files.length).toBe(2);
  await release();
  expect(dma.files.length).toBe(1);
});
