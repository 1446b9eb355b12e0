import { VhostdError } from "../base/errors.ts";
import type { OwnedFd } from "../native/fd.ts";
import { checkRegion, type Region } from "./guest-memory.ts";
import type { SessionRecord } from "./record.ts";
import { RING_FDS, type Ring, type RingFd } from "./rings.ts";
import type { SessionState } from "./state.ts";

/** Parts of a session as plain data, and back. */

/** A session that has just begun. */
export const FRESH_RECORD: SessionRecord = {
  state: { kind: "connected" },
  protocolFeatures: "0x0",
  status: 0,
  regions: [],
  removed: [],
  rings: [],
};

/** @throws VhostdError connectionLost after the end */
export function encodeState(state: SessionState): SessionRecord["state"] {
  switch (state.kind) {
    case "connected":
      return { kind: state.kind };
    case "negotiated":
    case "preparing":
    case "stopped":
      return { kind: state.kind, features: word(state.features) };
    case "running":
      return { ...state, features: word(state.features), queues: [...state.queues], enabled: [...state.enabled] };
    case "closed":
      throw new VhostdError("connectionLost", `the session has ended: ${state.reason}`);
  }
}

export function decodeState(state: SessionRecord["state"]): SessionState {
  return "features" in state ? { ...state, features: BigInt(state.features) } : state;
}

export function encodeRegions(regions: readonly Region[]): SessionRecord["regions"] {
  return regions.map(({ range, userAddress }) => ({
    guestAddress: range.iova,
    size: range.size,
    userAddress,
    fileOffset: range.offset,
  }));
}

/** Checked like regions that a front-end sends: the record may be damaged, and its files may have changed. */
export function reviveRegions(record: SessionRecord, takeFd: (name: string) => OwnedFd | undefined): Region[] {
  const regions: Region[] = [];
  for (const [index, description] of record.regions.entries()) {
    const fd = takeFd(`region.${index}`);
    if (fd === undefined) throw new VhostdError("invalid", `the stored session lacks the fd region.${index}`);
    regions.push({ range: checkRegion(description, fd, regions), userAddress: description.userAddress, fd });
  }
  return regions;
}

/** By name, borrowed. */
export function snapshotFds(regions: readonly Region[], rings: readonly Ring[]): Map<string, number> {
  const fds = new Map<string, number>();
  for (const [index, region] of regions.entries()) fds.set(`region.${index}`, region.fd.number);
  for (const ring of rings) {
    for (const which of RING_FDS) {
      const fd = ring.fds[which];
      if (fd !== undefined) fds.set(ringFdName(which, ring.index), fd.number);
    }
  }
  return fds;
}

export function ringFdName(which: RingFd, ring: number): string {
  return `${which}.${ring}`;
}

export function word(value: bigint): string {
  return `0x${value.toString(16)}`;
}
