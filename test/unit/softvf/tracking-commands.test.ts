import { expect, test } from "bun:test";
import { AdminError } from "../../../src/softvf/admin-error.ts";
import { PfSettings } from "../../../src/softvf/pf-options.ts";
import { decodeTracking, type TrackingCommand } from "../../../src/softvf/tracking-commands.ts";
import {
  DirtyPagesCommand,
  type DirtyPagesCommandName,
  REPORT_MAP_DATA,
  START_TRACKING_DATA,
  TRACKED_RANGE_DATA,
  TRACKING_MAP_PIECE,
  TrackingMode,
} from "../../../src/virtio/admin/vendor.ts";

const MODES = new PfSettings().tracking;

function decode(name: DirtyPagesCommandName, data: readonly Uint8Array[], room = 1 << 20, modes = MODES) {
  return decodeTracking(DirtyPagesCommand[name], Buffer.concat(data), room, modes);
}

function refusal(run: () => TrackingCommand): string {
  try {
    run();
  } catch (error) {
    if (error instanceof AdminError) return `${error.code}: ${error.message}`;
  }
  throw new Error("it was taken");
}

const usual = {
  vdevId: 1,
  mode: TrackingMode.pushBitmap as number,
  pageSize: 4096,
  rangeAddress: 0x1000n,
  rangeLength: 64n << 12n,
};
const start = (change: Partial<typeof usual> = {}) => START_TRACKING_DATA.encode({ ...usual, ...change });
const piece = (address: bigint, length: number) => TRACKING_MAP_PIECE.encode({ address, length });

test("a start is taken apart: range, mode, pieces of the map", () => {
  const range = { address: 0x1000, length: 64 << 12, pageSize: 4096 };
  expect(decode("startTracking", [start(), piece(0x5000n, 5), piece(0x9003n, 3)])).toEqual({
    name: "startTracking",
    vdevId: 1,
    plan: {
      mode: "pushBitmap",
      range,
      places: [
        { address: 0x5000, length: 5 },
        { address: 0x9003, length: 3 },
      ],
    },
  });
  // A map that is larger than it must be.
  expect(decode("startTracking", [start(), piece(0n, 0xffff_ffff)])).toMatchObject({ name: "startTracking" });
  const pull = { mode: TrackingMode.pullBytemap, pageSize: 2 ** 21, rangeAddress: 0n, rangeLength: 1n << 40n };
  expect(decode("startTracking", [start(pull)])).toMatchObject({
    plan: { mode: "pullBytemap", range: { address: 0, length: 2 ** 40, pageSize: 2 ** 21 }, places: [] },
  });
});

test("other commands are taken apart", () => {
  const data = TRACKED_RANGE_DATA.encode({ vdevId: 3, rangeAddress: 0x7000n });
  expect(decode("stopTracking", [data], 0)).toEqual({ name: "stopTracking", vdevId: 3, address: 0x7000 });
  expect(decode("pendingMap", [data], 8)).toEqual({ name: "pendingMap", vdevId: 3, address: 0x7000 });
  expect(decode("trackingIdentity", [], 8)).toEqual({ name: "trackingIdentity" });
  const report = REPORT_MAP_DATA.encode({ vdevId: 3, offset: 16n, length: 32n, rangeAddress: 0x7000n });
  expect(decode("reportMap", [report], 32)).toEqual({
    name: "reportMap",
    vdevId: 3,
    address: 0x7000,
    offset: 16,
    length: 32,
  });
});

test("what makes no sense is refused with the value seen and the limit", () => {
  const map = piece(0n, 4096);
  const begin = (change: Partial<typeof usual>, ...pieces: readonly Uint8Array[]) =>
    refusal(() => decode("startTracking", [start(change), ...(pieces.length === 0 ? [map] : pieces)]));
  const pull = TrackingMode.pullBitmap;
  expect(begin({ mode: 0 })).toContain("error: mode 0 is not offered; pushBitmap, pushBytemap");
  expect(begin({ mode: 5 })).toContain("error: mode 5 is not offered");
  for (const pageSize of [0, 1, 2048, 4097, 12_288, 0xffff_ffff]) {
    expect(begin({ pageSize })).toContain(`error: pages of ${pageSize} bytes; a power of two from 4096`);
  }
  expect(begin({ rangeLength: 0n })).toContain("error: range 0x1000+0x0 is empty");
  expect(begin({ rangeLength: 2n ** 64n - 4096n })).toContain("beyond 2^53");
  expect(begin({ rangeAddress: 2n ** 64n - 4096n, rangeLength: 8192n })).toContain("beyond 2^53");
  expect(begin({ rangeAddress: 0x1800n })).toContain("error: range 0x1800+0x40000 is not made of pages of 4096");
  expect(begin({ rangeLength: 0x1801n })).toContain("is not made of pages");
  expect(begin({ pageSize: 8192 })).toContain("is not made of pages of 8192");
  expect(begin({ mode: pull, rangeLength: 2n ** 42n + 4096n })).toContain(
    "error: 1073741825 pages to be kept; at most",
  );
  expect(begin({}, piece(0n, 7))).toContain("error: the map has 7 bytes; 8 for 262144 of memory");
  expect(begin({ mode: TrackingMode.pushBytemap }, piece(0n, 63))).toContain("the map has 63 bytes; 64");
  expect(begin({}, new Uint8Array(0))).toContain("error: the map is in 0 pieces; 1 to 256");
  expect(begin({}, ...Array.from({ length: 257 }, () => map))).toContain("the map is in 257 pieces");
  expect(begin({}, map, piece(0n, 0))).toContain("error: piece 0x0+0x0 of the map is no memory");
  expect(begin({}, piece(2n ** 64n - 1n, 4096))).toContain("error: piece 0xffffffffffffffff+0x1000");
  expect(begin({}, map.subarray(0, 15))).toContain("dataTransfer: piece of a dirty map has 15 bytes; 16 needed");
  expect(refusal(() => decode("startTracking", [start().subarray(0, 23)]))).toContain("dataTransfer: start tracking");
});

test("a mode is taken where it is offered only, commands where they fit only", () => {
  const some = new PfSettings({ tracking: "push-bytemap, pull-bitmap" }).tracking;
  expect([...some]).toEqual(["pushBytemap", "pullBitmap"]);
  expect(refusal(() => decode("startTracking", [start()], 0, some))).toContain(
    "mode pushBitmap is not offered; pushBy",
  );
  expect([...MODES]).toEqual(["pushBitmap", "pushBytemap", "pullBitmap", "pullBytemap"]);
  expect(new PfSettings({ tracking: "none" }).tracking.size).toBe(0);
  expect(() => new PfSettings({ tracking: "push" })).toThrow(
    'option tracking has "push", must be none or some of push-',
  );
  const data = TRACKED_RANGE_DATA.encode({ vdevId: 3 });
  const report = (length: bigint) => REPORT_MAP_DATA.encode({ vdevId: 1, length });
  for (const [name, bytes, room] of [
    ["trackingIdentity", new Uint8Array(0), 7],
    ["pendingMap", data, 7],
    ["pendingMap", data.subarray(0, 15), 8],
    ["stopTracking", data.subarray(0, 15), 0],
    ["reportMap", report(8n), 7],
    ["reportMap", report(8n).subarray(0, 31), 8],
    ["reportMap", report(2n ** 64n - 1n), 1 << 20],
  ] as const) {
    expect(refusal(() => decode(name, [bytes], room))).toStartWith("dataTransfer: ");
  }
  expect(refusal(() => decode("reportMap", [report(2n ** 19n + 1n)]))).toContain(
    "error: 524289 bytes of map in a report",
  );
  expect(refusal(() => decodeTracking(5, data, 8, MODES))).toStartWith("invalidCommand: ");
});
