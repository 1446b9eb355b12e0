import { afterEach, describe, expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { duplicate, liveFds } from "../../../src/native/fd.ts";
import { Mapping } from "../../../src/native/mmio.ts";
import {
  drainEventfd,
  eventfd,
  fileInfo,
  memfd,
  openFile,
  signalEventfd,
  socketPair,
} from "../../../src/native/sys.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import { VfioUserAddressSpace } from "../../../src/pci/vfio-user/address-space.ts";
import { VfioUserClient } from "../../../src/pci/vfio-user/client.ts";
import { VfioUserFunction } from "../../../src/pci/vfio-user/function.ts";
import {
  Command,
  DEVICE_INFO,
  DMA_MAP,
  DMA_UNMAP,
  IRQ_INFO,
  IRQ_SET,
  QUEUE_COUNTERS,
  QUEUE_STATS,
  REGION_ACCESS,
  REGION_CAP,
  REGION_INFO,
  REGION_IO_FDS,
  RegionFlag,
  SET_KICK,
  SPARSE_AREA,
  SPARSE_MMAP,
} from "../../../src/vfio-user/messages.ts";
import { encodeVersion } from "../../../src/vfio-user/version.ts";
import { rejection } from "../../kit/rejection.ts";
import { type Answer, BAR_SIZE, CAPABILITIES, ioFds, type Request, ScriptedServer } from "./scripted-server.ts";

const ADDRESS = parsePciAddress("5a:00.1");
const soon = (ms = 1000) => Deadline.after(ms, "the test");
const undo: Disposable[] = [];
afterEach(async () => {
  for (const one of undo.splice(0).reverse()) one[Symbol.dispose]();
  await soon().poll(() => liveFds() === 0 || undefined, 1);
});

type Prepare = (server: ScriptedServer) => void;

async function open(prepare: Prepare = () => {}) {
  const [near, far] = socketPair();
  const server = new ScriptedServer(far);
  undo.push(server);
  prepare(server);
  const fn = await VfioUserFunction.over(ADDRESS, await VfioUserClient.over(near, "the server", soon()), soon());
  undo.push({ [Symbol.dispose]: () => void fn[Symbol.asyncDispose]() });
  server.requests.length = 0;
  return { fn, server };
}

/** Puts an answer in the place of the one for this region. */
function forRegion(
  server: ScriptedServer,
  command: number,
  index: number,
  answer: Answer | ((usual: Answer) => Answer),
) {
  server.script.set(command, (request: Request) => {
    const usual = server.usual(request);
    if (request.body[8] !== index) return usual;
    return typeof answer === "function" ? answer(usual) : answer;
  });
}

describe("what the queues have done", () => {
  const counters = [
    { received: 2 ** 40, completed: 7, bad: 1, bytes: 4096 },
    { received: 0, completed: 0, bad: 0, bytes: 0 },
  ];
  const reply = (count: number, given = counters) => ({
    body: Uint8Array.of(...QUEUE_STATS.encode({ count }), ...given.flatMap((one) => [...QUEUE_COUNTERS.encode(one)])),
  });
  const counting = (server: ScriptedServer) => {
    const capabilities = { ...CAPABILITIES, queueStats: 1 };
    server.script.set(Command.version, () => ({ body: encodeVersion({ major: 0, minor: 1, capabilities }) }));
  };

  test("is asked for where the server counts", async () => {
    expect((await open()).fn.queueStats).toBeUndefined();
    const { fn, server } = await open(counting);
    server.script.set(Command.queueStats, () => reply(2));
    expect(await fn.queueStats?.()).toEqual(counters);
    expect(server.commands).toEqual(["queueStats"]);
  });

  test("is not believed where the answer makes no sense", async () => {
    const { fn, server } = await open(counting);
    const lies: Answer[] = [reply(3), reply(1), reply(0xffff_ffff), { body: new Uint8Array(4) }];
    lies.push({ body: Uint8Array.of(...reply(2).body.subarray(0, 8), ...new Uint8Array(64).fill(0xff)) });
    for (const lie of lies) {
      server.script.set(Command.queueStats, () => lie);
      expect(await rejection(fn.queueStats!())).toMatchObject({ code: "protocol" });
    }
    server.script.set(Command.queueStats, () => ({ errno: 95 }));
    expect(await rejection(fn.queueStats!())).toMatchObject({ errno: 95 });
  });
});

describe("registers", () => {
  test("are read and written in order, by width", async () => {
    const { fn, server } = await open();
    const bar = fn.region(4);
    const results = await Promise.all([
      bar.write(8, 4, 0xdead_beef),
      bar.read(8, 4),
      bar.write(9, 1, 0),
      bar.read(8, 4),
    ]);
    expect(results[1]).toBe(0xdead_beef);
    expect(results[3]).toBe(0xdead_00ef);
    server.memory.get(7)?.set([0xf4, 0x1a]);
    expect(await fn.config.read(0, 2)).toBe(0x1af4);
    expect((await bar.readBytes(0, BAR_SIZE)).length).toBe(BAR_SIZE);
  });

  test("outside a region are never asked for", async () => {
    const { fn, server } = await open();
    expect(() => fn.region(2)).toThrow(expect.objectContaining({ code: "barRead" }));
    expect(await rejection(fn.region(4).read(BAR_SIZE - 2, 4))).toMatchObject({ code: "barRead" });
    expect(await rejection(fn.region(4).write(-1, 1, 0))).toMatchObject({ code: "barRead" });
    expect(() => fn.doorbell(4, BAR_SIZE)).toThrow(/outside/);
    expect(server.requests).toEqual([]);
  });

  test("an answer that does not fit the question is not used", async () => {
    const { fn, server } = await open();
    const lies: Answer[] = [
      { body: new Uint8Array(3) },
      { body: REGION_ACCESS.encode({ offset: 8, region: 4, count: 4 }) },
      { body: Uint8Array.of(...REGION_ACCESS.encode({ offset: 8, region: 4, count: 8 }), ...new Uint8Array(8)) },
      { body: Uint8Array.of(...REGION_ACCESS.encode({ offset: 12, region: 4, count: 4 }), 1, 2, 3, 4) },
      { body: Uint8Array.of(...new Uint8Array(8).fill(0xff), ...new Uint8Array(12)) },
    ];
    for (const lie of lies) {
      server.script.set(Command.regionRead, () => lie);
      expect(await rejection(fn.region(4).read(8, 4))).toMatchObject({ code: "protocol" });
    }
    server.script.set(Command.regionWrite, () => ({ body: REGION_ACCESS.encode({ offset: 8, region: 4, count: 1 }) }));
    expect(await rejection(fn.region(4).write(8, 4, 1))).toMatchObject({ code: "protocol" });
  });
});

describe("a lying server is not opened", () => {
  const info = (value: Parameters<typeof REGION_INFO.encode>[0]) => ({
    body: REGION_INFO.encode({ argsz: 32, ...value }),
  });
  const lies: [string, Prepare, RegExp][] = [
    [
      "no PCI device",
      (s) => s.script.set(Command.getInfo, () => ({ body: DEVICE_INFO.encode({ regions: 9 }) })),
      /PCI/,
    ],
    [
      "too few regions",
      (s) => s.script.set(Command.getInfo, () => ({ body: DEVICE_INFO.encode({ flags: 2, regions: 7 }) })),
      /7 regions/,
    ],
    ["another region", (s) => forRegion(s, Command.getRegionInfo, 4, info({ index: 3 })), /region 3.*where 4/],
    ["a huge region", (s) => forRegion(s, Command.getRegionInfo, 4, info({ index: 4, size: 2 ** 50 })), /at most/],
    [
      "a size beyond 2^53",
      (s) => forRegion(s, Command.getRegionInfo, 4, { body: new Uint8Array(32).fill(0xff) }),
      /malformed/,
    ],
    ["no configuration space", (s) => forRegion(s, Command.getRegionInfo, 7, info({ index: 7, size: 64 })), /64 bytes/],
    [
      "too many vectors",
      (s) => s.script.set(Command.getIrqInfo, () => ({ body: IRQ_INFO.encode({ index: 2, count: 4096 }) })),
      /4096 vectors/,
    ],
    [
      "a doorbell outside",
      (s) => forRegion(s, Command.getRegionIoFds, 4, (u) => ({ ...u, body: ioFds([BAR_SIZE]) })),
      /sub-region/,
    ],
    [
      "a missing descriptor",
      (s) => forRegion(s, Command.getRegionIoFds, 4, (u) => ({ ...u, fds: [] })),
      /descriptor 0 of 0/,
    ],
    [
      "an unknown flag",
      (s) => forRegion(s, Command.getRegionIoFds, 4, (u) => ({ ...u, body: ioFds([0], { flags: 4 }) })),
      /flags 4/,
    ],
    [
      "more doorbells than bytes",
      (s) => forRegion(s, Command.getRegionIoFds, 4, { body: REGION_IO_FDS.encode({ argsz: 16, index: 4, count: 9 }) }),
      /9 sub-regions/,
    ],
  ];
  test.each(lies)("%s", async (_, prepare, message) => {
    expect((await rejection(open(prepare))).message).toMatch(message);
  });

  test("a file in the place of an eventfd", async () => {
    using file = memfd("file", 4096);
    const opened = open((s) => forRegion(s, Command.getRegionIoFds, 4, { body: ioFds([0]), fds: [file.number] }));
    expect((await rejection(opened)).message).toMatch(/not an eventfd/);
  });

  const area = (offset: number, size: number, capOffset = 32, next = 0) => {
    const body = new Uint8Array(REGION_INFO.size + REGION_CAP.size + SPARSE_MMAP.size + SPARSE_AREA.size);
    const flags = RegionFlag.mmap | RegionFlag.caps;
    REGION_INFO.write(body, { argsz: body.length, flags, index: 4, size: BAR_SIZE, capOffset });
    REGION_CAP.write(body, { id: next === 0 ? 1 : 9, version: 1, next }, 32);
    SPARSE_MMAP.write(body, { areas: 1 }, 40);
    SPARSE_AREA.write(body, { offset, size }, 48);
    return body;
  };
  test.each([
    ["an area outside the region", area(0x4000, 0x1000), /mappable area/],
    ["an area that is not aligned", area(0x3001, 0x1000), /mappable area/],
    ["an area beyond the file", area(0x3000, 0x1000), /beyond its file of 8192/],
    ["a capability outside the answer", area(0, 0x1000, 0x1000), /capability at byte 4096/],
    ["capabilities in a circle", area(0, 0x1000, 32, 32), /points back/],
  ] as [string, Uint8Array, RegExp][])("%s", async (_, body, message) => {
    using file = memfd("bar", 8192);
    const opened = open((s) => forRegion(s, Command.getRegionInfo, 4, { body, fds: [file.number] }));
    expect((await rejection(opened)).message).toMatch(message);
  });
});

describe("doorbells", () => {
  test("are rung through the server's eventfd, by us and by a kick", async () => {
    const { fn, server } = await open();
    const doorbell = fn.doorbell(4, 0x3004);
    await doorbell.ring(1);
    expect(drainEventfd(server.doorbells[1]!.number)).toBe(1);
    using kick = eventfd();
    using _ = doorbell.connect(kick.number, 1);
    signalEventfd(kick.number);
    await soon().poll(() => drainEventfd(server.doorbells[1]!.number) > 0 || undefined, 1);
    expect(drainEventfd(server.doorbells[0]!.number)).toBe(0);
    expect(server.requests).toEqual([]);
  });

  test("that share a place are told apart by the value", async () => {
    const body = ioFds([0x3000, 0x3000]);
    for (const i of [0, 1]) body.set([1, 0, 0, 0, 0, 0, 0, 0, i], REGION_IO_FDS.size + 40 * i + 24);
    const { fn, server } = await open((s) => forRegion(s, Command.getRegionIoFds, 4, (usual) => ({ ...usual, body })));
    await fn.doorbell(4, 0x3000).ring(1);
    expect(server.doorbells.map(({ number }) => drainEventfd(number))).toEqual([0, 1]);
  });

  test("are rung by a message where the server gives no eventfd, and cannot be connected", async () => {
    const { fn, server } = await open((s) => s.script.set(Command.getRegionIoFds, () => ({ errno: 95 })));
    const doorbell = fn.doorbell(4, 0x3000);
    await doorbell.ring(3);
    expect(server.commands).toEqual(["regionWrite"]);
    expect(server.memory.get(4)?.[0x3000]).toBe(3);
    expect(doorbell.share()).toBeUndefined();
    using kick = eventfd();
    expect(() => doorbell.connect(kick.number, 3)).toThrow(expect.objectContaining({ code: "notSupported" }));
  });

  test("are written into the region where it can be mapped", async () => {
    using file = memfd("bar", BAR_SIZE);
    const { fn } = await open((s) => {
      s.script.set(Command.getRegionIoFds, () => ({ errno: 22 }));
      const body = REGION_INFO.encode({ argsz: 32, flags: RegionFlag.mmap, index: 4, size: BAR_SIZE });
      forRegion(s, Command.getRegionInfo, 4, { body, fds: [file.number] });
    });
    using kick = eventfd();
    using view = Mapping.map(file.number, 0, BAR_SIZE, "read");
    using _ = fn.doorbell(4, 0x3004).connect(kick.number, 7);
    signalEventfd(kick.number);
    await soon().poll(() => view.read16(0x3004) === 7 || undefined, 1);
    expect(fn.doorbell(4, 0x3004).share()).toEqual({ fd: expect.any(Number), offset: 0x3000, size: 4096 });
  });

  test("are not mapped from a file whose pages another process may serve", async () => {
    using file = openFile("/proc/version", "read");
    const { fn } = await open((s) => {
      s.script.set(Command.getRegionIoFds, () => ({ errno: 22 }));
      const body = REGION_INFO.encode({ argsz: 32, flags: RegionFlag.mmap, index: 4, size: BAR_SIZE });
      forRegion(s, Command.getRegionInfo, 4, { body, fds: [file.number] });
    });
    using kick = eventfd();
    expect(fn.doorbell(4, 0x3004).share()).toBeUndefined();
    expect(() => fn.doorbell(4, 0x3004).connect(kick.number, 7)).toThrow(/by messages only/);
  });

  test("wait for a kick themselves where the server says that it can", async () => {
    const { fn, server } = await open((s) => {
      const capabilities = { ...CAPABILITIES, kickFds: 1 };
      s.script.set(Command.version, () => ({ body: encodeVersion({ major: 0, minor: 1, capabilities }) }));
    });
    const doorbell = fn.doorbell(4, 0x3004);
    using kick = eventfd();
    await doorbell.takeKick?.(kick.number);
    await doorbell.takeKick?.(null);
    const [connect, disconnect] = server.requests;
    expect(server.commands).toEqual(["setKick", "setKick"]);
    const there = { argsz: 24, region: 4, reserved: 0, offset: 0x3004 };
    expect(SET_KICK.read(connect!.body)).toEqual({ ...there, flags: 1 });
    expect(SET_KICK.read(disconnect!.body)).toEqual({ ...there, flags: 0 });
    expect(disconnect!.fds).toHaveLength(0);
    signalEventfd(kick.number);
    expect(drainEventfd(connect!.fds[0]!.number)).toBe(1);

    server.script.set(Command.setKick, () => ({ errno: 24 }));
    expect(await rejection(doorbell.takeKick!(kick.number))).toMatchObject({ errno: 24 });
  });

  test("do not take a kick where the server says nothing of it", async () => {
    const { fn } = await open();
    expect(fn.doorbell(4, 0x3004).takeKick).toBeUndefined();
  });

  test("more of them than were asked for are asked for again", async () => {
    const offsets = Array.from({ length: 300 }, (_, i) => i * 4);
    const asked: number[] = [];
    const { fn, server } = await open((s) =>
      s.script.set(Command.getRegionIoFds, ({ body }) => {
        const { argsz } = REGION_IO_FDS.read(body);
        asked.push(argsz);
        const whole = ioFds(offsets, { fdIndex: 0 });
        const fds = [s.doorbells[0]!.number];
        return argsz < whole.length ? { body: whole.subarray(0, 16) } : { body: whole, fds };
      }),
    );
    expect(asked).toEqual([16 + 128 * 40, 16 + 300 * 40]);
    await fn.doorbell(4, 299 * 4).ring(0);
    expect(drainEventfd(server.doorbells[0]!.number)).toBe(1);
  });
});

describe("interrupts", () => {
  test("are routed one at a time", async () => {
    const { fn, server } = await open();
    using call = eventfd();
    await Promise.all([fn.interrupts.route(2, call.number), fn.interrupts.route(2, null)]);
    const [set, unset] = server.requests;
    expect(IRQ_SET.read(set!.body)).toEqual({ argsz: 20, flags: 0x24, index: 2, start: 2, count: 1 });
    expect(set!.fds).toHaveLength(1);
    expect(IRQ_SET.read(unset!.body)).toEqual({ argsz: 20, flags: 0x24, index: 2, start: 2, count: 1 });
    expect(unset!.fds).toHaveLength(0);
    expect(fn.interrupts.count).toBe(3);
    expect(await rejection(fn.interrupts.route(3, call.number))).toMatchObject({ code: "noVectors" });
  });
});

describe("memory", () => {
  const range = (iova: number, fd: number) => {
    const { dev, ino } = fileInfo(fd);
    return { iova, size: 4096, offset: 8192, file: { dev, ino } };
  };

  test("is given to every function and taken from every function", async () => {
    const [a, b] = [await open(), await open()];
    const space = new VfioUserAddressSpace();
    using file = memfd("memory", 65536);
    const first = range(0, file.number);
    await space.map(first, file.number, soon());
    for (const { fn } of [a, b]) await space.attach(fn, [{ ...first, fd: file.number }], soon());
    const second = range(4096, file.number);
    await space.map(second, file.number, soon());
    await space.unmap(first, soon());
    await space.detach(a.fn, [second], soon());
    await space.unmap(second, soon());
    expect(a.server.commands).toEqual(["dmaMap", "dmaMap", "dmaUnmap", "dmaUnmap"]);
    expect(b.server.commands).toEqual(["dmaMap", "dmaMap", "dmaUnmap", "dmaUnmap"]);
    const { body, fds } = a.server.requests[1]!;
    expect(DMA_MAP.read(body)).toEqual({ argsz: 32, flags: 3, offset: 8192, address: 4096, size: 4096 });
    expect(fileInfo(fds[0]!.number).ino).toBe(second.file.ino);
    expect(DMA_UNMAP.read(a.server.requests[2]!.body)).toEqual({ argsz: 24, flags: 0, address: 0, size: 4096 });
  });

  test("that no function takes is refused, and nobody is hung up on", async () => {
    const { fn, server } = await open();
    const space = new VfioUserAddressSpace();
    await space.attach(fn, [], soon());
    server.script.set(Command.dmaMap, () => ({ errno: 12 }));
    using file = memfd("memory", 65536);
    expect(await rejection(space.map(range(0, file.number), file.number, soon()))).toMatchObject({ errno: 12 });
    expect(server.commands).toEqual(["dmaMap"]);
    expect(fn.gone).toBeUndefined();
  });

  for (const [how, answer] of [
    ["refuses", { errno: 12 }],
    ["never answers for", { silent: true }],
  ] as const) {
    test(`that one function ${how} costs that function, not the others`, async () => {
      const [a, b] = [await open(), await open()];
      const space = new VfioUserAddressSpace();
      for (const { fn } of [a, b]) await space.attach(fn, [], soon());
      b.server.script.set(Command.dmaMap, () => answer);
      using file = memfd("memory", 65536);
      await space.map(range(0, file.number), file.number, soon(100));
      expect(a.server.commands).toEqual(["dmaMap"]);
      expect(a.fn.gone).toBeUndefined();
      expect((await b.fn.lost).message).toMatch(/would not take guest memory/);
    });
  }

  test("that may be mapped is unmapped where it is; any other refusal costs the function", async () => {
    const [a, b, c] = [await open(), await open(), await open()];
    const space = new VfioUserAddressSpace();
    for (const { fn } of [a, b, c]) space.adopt(fn);
    b.server.script.set(Command.dmaUnmap, () => ({ errno: 2 }));
    c.server.script.set(Command.dmaUnmap, () => ({ errno: 22 }));
    using file = memfd("memory", 65536);
    await space.unmapIfThere(range(0, file.number), soon());
    expect((await c.fn.lost).message).toMatch(/would not let go of guest memory/);
    expect([a.server.commands, b.server.commands]).toEqual([["dmaUnmap"], ["dmaUnmap"]]);
    expect([a.fn.gone, b.fn.gone]).toEqual([undefined, undefined]);
  });

  test("that a function will not let go of costs that function, not the others", async () => {
    const [a, b] = [await open(), await open()];
    const space = new VfioUserAddressSpace();
    for (const { fn } of [a, b]) await space.attach(fn, [], soon());
    using file = memfd("memory", 65536);
    const one = range(0, file.number);
    await space.map(one, file.number, soon());
    a.server.script.set(Command.dmaUnmap, () => ({ errno: 16 }));
    await space.unmap(one, soon());
    expect((await a.fn.lost).message).toMatch(/would not let go of guest memory/);
    expect(b.fn.gone).toBeUndefined();
    await space.map(one, file.number, soon());
    await space.detach(a.fn, [one], soon());
    expect(b.server.commands).toEqual(["dmaMap", "dmaUnmap", "dmaMap"]);
  });
});

test("a function goes on in another process without a message", async () => {
  const { fn, server } = await open();
  const { data, fds } = fn.snapshot();
  const record = JSON.parse(JSON.stringify(data));
  const copies = () => new Map([...fds].map(([name, number]) => [name, duplicate(number)]));
  expect([...fds.keys()].filter((name) => !name.startsWith("doorbell"))).toEqual(["socket", "turns"]);
  const own = copies();
  const without = copies();
  without.get("socket")?.[Symbol.dispose]();
  without.delete("socket");
  expect(() => VfioUserFunction.revive(ADDRESS, record, without)).toThrow(/lacks the descriptor socket/);
  expect(() => VfioUserFunction.revive(ADDRESS, { ...record, bars: [] }, copies())).toThrow(/not understood/);
  fn.abandon();

  const revived = VfioUserFunction.revive(ADDRESS, record, own);
  undo.push({ [Symbol.dispose]: () => void revived[Symbol.asyncDispose]() });
  await revived.doorbell(4, 0x3004).ring(1);
  expect(drainEventfd(server.doorbells[1]!.number)).toBe(1);
  expect(server.requests).toEqual([]);
  await revived.region(4).write(0, 4, 5);
  expect(await revived.region(4).read(0, 4)).toBe(5);
  expect(revived.interrupts.count).toBe(3);
});
