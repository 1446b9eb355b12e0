import { expect, test } from "bun:test";
import fc from "fast-check";
import { VhostdError } from "../../../src/base/errors.ts";
import { eventfd, memfd } from "../../../src/native/sys.ts";
import {
  decodeAccess,
  decodeIoFdsRequest,
  decodeIrqIndex,
  decodeMap,
  decodeRegionIndex,
  decodeSetIrqs,
  decodeSetKick,
  decodeUnmap,
} from "../../../src/softvf/requests.ts";
import { DMA_MAP, IRQ_SET, SET_KICK } from "../../../src/vfio-user/messages.ts";

test("whatever a client sends is taken within its limits or refused with an errno", () => {
  using memory = memfd("test", 8192);
  using event = eventfd();
  const word = fc.oneof(fc.constantFrom(0, 1, 2, 3, 7, 8, 4096, 8192, 0xffff_ffff), fc.nat(0xffff_ffff));
  const bodies = fc.array(word, { maxLength: 10 }).map((words) => new Uint8Array(Uint32Array.from(words).buffer));
  const fds = fc.array(fc.constantFrom(memory, event), { maxLength: 3 });
  const attempt = <T>(decode: () => T): T | undefined => {
    try {
      return decode();
    } catch (error) {
      expect(error).toBeInstanceOf(VhostdError);
      expect((error as VhostdError).number).toBeLessThan(160);
      return undefined;
    }
  };
  fc.assert(
    fc.property(bodies, fds, (body, given) => {
      const map = attempt(() => decodeMap(body, given));
      if (map !== undefined) expect(map.offset + map.size).toBeLessThanOrEqual(8192);
      const range = attempt(() => decodeUnmap(body));
      if (typeof range === "object") expect(range.iova % 4096).toBe(0);
      const irqs = attempt(() => decodeSetIrqs(body, given, 5));
      if (irqs !== undefined) expect(irqs.start + irqs.count).toBeLessThanOrEqual(5);
      const kick = attempt(() => decodeSetKick(body, given, (_, offset) => (offset < 8 ? offset : undefined)));
      if (kick?.connect === true) expect(given).toEqual([event]);
      if (kick !== undefined) expect(kick.queue).toBeLessThan(8);
      const access = attempt(() => decodeAccess(body, (region) => (region === 4 ? 8192 : 0)));
      if (access !== undefined) expect(access.offset + access.count).toBeLessThanOrEqual(8192);
      for (const decode of [decodeRegionIndex, decodeIoFdsRequest, decodeIrqIndex]) {
        const indexed = attempt(() => decode(body, 5));
        if (indexed !== undefined) expect(indexed.index).toBeLessThan(5);
      }
    }),
    { numRuns: 2000 },
  );
});

test("good requests are taken", () => {
  using memory = memfd("test", 8192);
  using event = eventfd();
  const map = DMA_MAP.encode({ argsz: 32, flags: 3, offset: 4096, address: 1 << 20, size: 4096 });
  expect(decodeMap(map, [memory])).toEqual({ iova: 1 << 20, size: 4096, offset: 4096, writable: true });
  const route = IRQ_SET.encode({ argsz: 20, flags: 0x24, index: 2, start: 1, count: 1 });
  expect(decodeSetIrqs(route, [event], 5)).toEqual({ start: 1, count: 1, action: "route" });
  expect(decodeSetIrqs(route, [], 5)).toEqual({ start: 1, count: 1, action: "unroute" });
  const none = IRQ_SET.encode({ argsz: 20, flags: 0x21, index: 2, start: 0, count: 0 });
  expect(decodeSetIrqs(none, [], 5)).toEqual({ start: 0, count: 5, action: "unroute" });
});

test("a kick comes as one eventfd, for a place that is a doorbell", () => {
  using memory = memfd("test", 8192);
  using event = eventfd();
  const queueAt = (region: number, offset: number) => (region === 4 && offset === 0x3000 ? 0 : undefined);
  const good = { argsz: 24, flags: 1, region: 4, offset: 0x3000 };
  const decode = (change: Parameters<typeof SET_KICK.encode>[0], fds = [event]) =>
    decodeSetKick(SET_KICK.encode({ ...good, ...change }), fds, queueAt);
  expect(decode({})).toEqual({ queue: 0, connect: true });
  expect(decode({ flags: 0 }, [])).toEqual({ queue: 0, connect: false });
  expect(() => decode({}, [])).toThrow(/0 file descriptors; 1/);
  expect(() => decode({}, [event, event])).toThrow(/2 file descriptors; 1/);
  expect(() => decode({ flags: 0 })).toThrow(/1 file descriptors; 0/);
  expect(() => decode({}, [memory])).toThrow(/a regular file; an eventfd/);
  expect(() => decode({ flags: 3 })).toThrow(/flags 0x3/);
  expect(() => decode({ reserved: 7 })).toThrow(/reserved 0x7/);
  expect(() => decode({ region: 3 })).toThrow(/no doorbell at 0x3000 of region 3/);
  expect(() => decode({ offset: 0x3002 })).toThrow(/no doorbell at 0x3002 of region 4/);
});
