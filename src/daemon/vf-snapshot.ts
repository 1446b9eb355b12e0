import type { PciFunction } from "../pci/function.ts";
import type { RecordChange } from "../vhost-user/target.ts";
import type { DataPath } from "../virtio/data-path.ts";
import type { Storing } from "./keeper.ts";
import type { Link } from "./link.ts";
import type { OpenRings } from "./open-rings.ts";
import { joinedName, joinFds, RECORD_VERSION, type Snapshot, type VfRecord } from "./record.ts";
import type { VfOptions } from "./vf-parts.ts";

/** A VF as plain data, and its fds (borrowed). */
export interface VfSnapshot {
  readonly record: VfRecord;
  readonly fds: Map<string, number>;
}

/** What a VF's record is made of. */
export interface VfParticulars {
  readonly options: VfOptions;
  readonly held: VfRecord["held"];
  /** What is being done to it, which a later process must not take for the doing of others. */
  readonly underWay: "reset" | "end" | undefined;
  readonly shared: boolean;
  readonly rings: OpenRings;
  readonly link: Link;
  readonly fn: PciFunction;
  readonly dataPath: DataPath;
  /** undefined where no front-end is connected. */
  readonly session: Snapshot | undefined;
  readonly frontEnds: Snapshot;
}

/** The record of a VF as it is now. */
export function takeSnapshot(vf: VfParticulars): VfSnapshot {
  const { held, shared, underWay, session, frontEnds } = vf;
  const [fn, dataPath] = [vf.fn.snapshot(), vf.dataPath.snapshot()];
  return {
    record: {
      version: RECORD_VERSION,
      options: vf.options,
      ...(held === undefined ? {} : { held }),
      ...(shared ? { shared: true } : {}),
      ...(underWay === "reset" ? { resetting: true } : {}),
      ...(underWay === "end" ? { ending: true } : {}),
      function: fn.data,
      dataPath: dataPath.data,
      session: session?.data ?? null,
      rings: vf.rings.snapshot(),
      link: vf.link.snapshot(),
    },
    // In this order: of the first one, the connection or where one is waited for, a keeper is asked whether somebody waits, and
    // it answers on the connection.
    fds: joinFds({ session, frontEnds, function: fn, dataPath }),
  };
}

/** What a message has changed of the record, as the keeper is given it. */
export function storingOf(change: RecordChange, take: () => VfSnapshot): Storing | undefined {
  if (change === "nothing") return undefined;
  return change === "all" ? { take } : { take, replacement: [joinedName("session", change.name), change.fd] };
}
