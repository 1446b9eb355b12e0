import type { Deadline } from "../../base/deadline.ts";
import { VhostdError } from "../../base/errors.ts";
import type { MapForm } from "../../native/dirty-log.ts";
import { TRANSFER_MAX } from "./admin-memory.ts";
import type { AdminChannel, AdminRequest } from "./admin-request.ts";
import {
  AdminClass,
  DirtyPagesCommand,
  type DirtyPagesCommandName,
  PENDING_MAP_RESULT,
  REPORT_MAP_DATA,
  START_TRACKING_DATA,
  TRACKED_RANGE_DATA,
  TRACKING_IDENTITY_RESULT,
  TRACKING_MAP_PIECE,
  TrackingMode,
  type TrackingModeName,
  vdevName,
} from "./vendor.ts";

/** Commands that change what the device writes, whenever it comes to them. */
const ALTERING: readonly DirtyPagesCommandName[] = ["startTracking", "stopTracking"];

/** Guest memory whose pages are marked. Bytes, multiples of `pageSize`; guest-physical. */
export interface TrackedRange {
  readonly address: number;
  readonly length: number;
  readonly pageSize: number;
}

/** A map that the device writes, in the PF's own address space. Bytes. */
export interface MapPlace {
  readonly address: number;
  readonly length: number;
}

/** How much of a map one report can have, in bytes of the map. */
export type ReportLimits = Readonly<Record<MapForm, number>>;

/**
 * Commands of class 65: which pages a VF has written. All throw AdminRefusal and VhostdError io, adminQueue and busy, as
 * those of class 64 do.
 */
export class DirtyPagesAdmin {
  constructor(private readonly channel: AdminChannel) {}

  /** @throws VhostdError io where the limits make no sense */
  async identity(deadline: Deadline): Promise<ReportLimits> {
    const resultLength = TRACKING_IDENTITY_RESULT.size;
    const result = TRACKING_IDENTITY_RESULT.read(await this.ask("trackingIdentity", 0, { resultLength }, deadline));
    return {
      bitmap: reportBytes(result.log2PagesPullBitmap - 3),
      bytemap: reportBytes(result.log2PagesPullBytemap),
    };
  }

  /** @param place in push modes: the map, zeroes */
  async start(
    vdevId: number,
    mode: TrackingModeName,
    { address, length, pageSize }: TrackedRange,
    place: MapPlace | undefined,
    deadline: Deadline,
  ): Promise<void> {
    const data = new Uint8Array(START_TRACKING_DATA.size + (place === undefined ? 0 : TRACKING_MAP_PIECE.size));
    const range = { rangeAddress: BigInt(address), rangeLength: BigInt(length) };
    START_TRACKING_DATA.write(data, { vdevId, mode: TrackingMode[mode], pageSize, ...range });
    if (place !== undefined) {
      const piece = { address: BigInt(place.address), length: place.length };
      TRACKING_MAP_PIECE.write(data, piece, START_TRACKING_DATA.size);
    }
    await this.ask("startTracking", vdevId, { data }, deadline);
  }

  /** @param tries `once`: where it may be that nothing was started */
  async stop(
    vdevId: number,
    { address }: Pick<TrackedRange, "address">,
    deadline: Deadline,
    tries?: "once",
  ): Promise<void> {
    const data = TRACKED_RANGE_DATA.encode({ vdevId, rangeAddress: BigInt(address) });
    await this.ask("stopTracking", vdevId, { data, ...(tries === undefined ? {} : { tries }) }, deadline);
  }

  /** Bytes of the map that can be reported; refused, at the first try, where the device does not track the range. */
  async pending(vdevId: number, { address }: Pick<TrackedRange, "address">, deadline: Deadline): Promise<number> {
    const data = TRACKED_RANGE_DATA.encode({ vdevId, rangeAddress: BigInt(address) });
    const request = { data, resultLength: PENDING_MAP_RESULT.size, tries: "once" as const };
    const { pending } = PENDING_MAP_RESULT.read(await this.ask("pendingMap", vdevId, request, deadline));
    if (pending > BigInt(Number.MAX_SAFE_INTEGER)) {
      throw new VhostdError("io", `${vdevName(vdevId)} says that ${pending} bytes of its dirty map are pending`);
    }
    return Number(pending);
  }

  /** Bytes of the map, in pull modes; the device forgets what it reports. */
  report(
    vdevId: number,
    { address }: Pick<TrackedRange, "address">,
    offset: number,
    length: number,
    deadline: Deadline,
  ): Promise<Uint8Array> {
    const numbers = { offset: BigInt(offset), length: BigInt(length), rangeAddress: BigInt(address) };
    const data = REPORT_MAP_DATA.encode({ vdevId, ...numbers });
    return this.ask("reportMap", vdevId, { data, resultLength: length }, deadline);
  }

  private ask(
    name: DirtyPagesCommandName,
    vdevId: number,
    rest: Pick<AdminRequest, "data" | "resultLength" | "tries">,
    deadline: Deadline,
  ): Promise<Uint8Array> {
    const number = DirtyPagesCommand[name];
    const request = { class: AdminClass.dirtyPages, number, name, vdevId, alters: ALTERING.includes(name), ...rest };
    return this.channel.ask(request, deadline);
  }
}

/** Bytes of map in one report, as the device has it and as there is room for. @throws VhostdError io */
function reportBytes(log2: number): number {
  if (log2 < 0) throw new VhostdError("io", "the PF reports dirty pages in parts of less than a byte");
  return log2 >= Math.log2(TRANSFER_MAX) ? TRANSFER_MAX : 2 ** log2;
}
