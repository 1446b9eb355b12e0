import { VhostdError } from "../base/errors.ts";
import type { OwnedFd } from "../native/fd.ts";
import type { Backend } from "./backend.ts";
import type { Region, RegionDescription } from "./guest-memory.ts";
import { MEM_SLOTS, MEM_TABLE, MEM_TABLE_REGIONS_MAX, MEMORY_REGION, SINGLE_REGION_PADDING } from "./messages.ts";
import { checkInside } from "./rings.ts";

/** Handlers of the messages about guest memory. */

/** SET_MEM_TABLE. */
export async function setMemTable(backend: Backend, payload: Uint8Array, fds: OwnedFd[]): Promise<void> {
  const { regions } = MEM_TABLE.read(payload);
  const expected = MEM_TABLE.size + regions * MEMORY_REGION.size;
  if (regions > MEM_TABLE_REGIONS_MAX || payload.byteLength !== expected || fds.length !== regions) {
    throw new VhostdError(
      "protocol",
      `SET_MEM_TABLE with ${regions} regions has ${payload.byteLength} bytes of payload and ${fds.length} fds, ` +
        `must be ${expected} bytes, ${regions} fds and at most ${MEM_TABLE_REGIONS_MAX} regions`,
    );
  }
  const table = fds.map((_, index) => readRegion(payload, MEM_TABLE.size + index * MEMORY_REGION.size));
  await backend.memory.replace(table, fds.splice(0), (after) => checkRunningRings(backend, after));
}

/** ADD_MEM_REG. QEMU 7.2 says it once for each pair of queues; what is there already stays as it is. */
export async function addRegion(backend: Backend, payload: Uint8Array, fds: OwnedFd[]): Promise<void> {
  const description = readRegion(payload, SINGLE_REGION_PADDING);
  if (backend.memory.has(description, fds[0]!)) return;
  const slots = backend.memory.list.length;
  if (slots >= MEM_SLOTS) {
    throw new VhostdError("protocol", `ADD_MEM_REG for region ${slots + 1}, at most ${MEM_SLOTS} are possible`);
  }
  await backend.memory.add(description, fds.shift()!);
}

/** REM_MEM_REG, repeated by QEMU 7.2 as ADD_MEM_REG is. An fd that comes with it is closed with the message. */
export async function removeRegion(backend: Backend, payload: Uint8Array): Promise<void> {
  const description = readRegion(payload, SINGLE_REGION_PADDING);
  if (backend.memory.hasRemoved(description)) return;
  const region = backend.memory.find(description);
  checkRunningRings(
    backend,
    backend.memory.list.filter((other) => other !== region),
  );
  await backend.memory.remove(region);
}

/** @throws VhostdError protocol where a ring in use would lose its memory */
function checkRunningRings(backend: Backend, regions: readonly Region[]): void {
  for (const ring of backend.rings) {
    if (backend.runs(ring) && ring.addresses !== undefined) checkInside(ring.index, ring.size, ring.addresses, regions);
  }
}

function readRegion(payload: Uint8Array, at: number): RegionDescription {
  return MEMORY_REGION.read(payload, at);
}
