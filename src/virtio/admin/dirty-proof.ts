import { Deadline } from "../../base/deadline.ts";
import { asError } from "../../base/errors.ts";
import { mapBytes } from "../../native/dirty-log.ts";
import { LOG_PAGE } from "../dirty-log.ts";
import { AdminRefusal } from "./admin-request.ts";
import type { MapSource } from "./dirty-map.ts";
import { TRACKING_KIND, type TrackingModeName } from "./vendor.ts";

/** Guest memory that is tracked to see whether it can be: as many pages as a word of the log has bits. */
const PAGES = 64;
const RANGE = { address: 0, length: PAGES * LOG_PAGE, pageSize: LOG_PAGE } as const;
/** Milliseconds for one mode: who adds a VF waits. */
const PROOF_TIMEOUT = 3_000;

/**
 * The first of these modes in which the device begins and ends to mark what a VF writes, tried on a VF at rest. Never
 * rejects.
 * @returns the mode, or why there is none
 */
export async function proveTracking(
  modes: readonly TrackingModeName[],
  source: MapSource,
  deadline: Deadline,
): Promise<{ readonly mode: TrackingModeName } | { readonly reason: string }> {
  const reasons: string[] = [];
  for (const mode of modes) {
    const time = Math.min(PROOF_TIMEOUT, deadline.remaining);
    try {
      await prove(mode, source, Deadline.after(time, `trying to mark pages (${mode})`));
      return { mode };
    } catch (error) {
      reasons.push(`${mode}: ${asError(error).message}`);
    }
    // What was never answered may be done yet.
    if (!source.settled()) break;
  }
  return { reason: reasons.length === 0 ? "its PF offers no way" : reasons.join("; ") };
}

async function prove(mode: TrackingModeName, source: MapSource, deadline: Deadline): Promise<void> {
  const { commands, vdevId, memory } = source;
  const { form, push } = TRACKING_KIND[mode];
  const size = mapBytes(form, PAGES);
  const limit = push ? 0 : (await commands.identity(deadline))[form];
  const map = push ? await memory.own(size) : undefined;
  const place = map && { address: map.address, length: size };
  try {
    await commands.start(vdevId, mode, RANGE, place, deadline);
    if (!push) await commands.report(vdevId, RANGE, 0, Math.min(limit, size), deadline);
    await commands.stop(vdevId, RANGE, deadline);
  } catch (error) {
    // The map stays for what was never answered and may be done yet, be it the second try of what was refused at the first,
    // and where the device does not end what it has begun.
    const answered = error instanceof AdminRefusal && source.settled();
    if (answered && (await marksNothing(source, deadline))) await map?.release();
    else map?.memory[Symbol.dispose]();
    throw error;
  }
  await map?.release();
}

/** The device says that it does not know the range. */
function marksNothing({ commands, vdevId }: MapSource, deadline: Deadline): Promise<boolean> {
  return commands.pending(vdevId, RANGE, deadline).then(
    () => false,
    (error) => error instanceof AdminRefusal,
  );
}
