import type { Backend } from "./backend.ts";
import type { RequestRow } from "./requests.ts";
import { ringFdName } from "./snapshot.ts";
import type { RecordChange } from "./target.ts";

/**
 * Looks at what a message is about before it is handled.
 * @returns what it has changed of the session's record, to be asked when it was handled
 */
export function watchRecord(row: RequestRow, payload: Uint8Array, { rings }: Backend): () => RecordChange {
  if (!row.records) return () => "nothing";
  const replaced = row.replaces?.(payload);
  if (replaced === undefined) return () => "all";
  const { ring, which } = replaced;
  const fd = () => rings[ring]?.fds[which]?.number;
  const before = fd();
  return () => {
    const now = fd();
    return before === undefined || now === undefined ? "all" : { name: ringFdName(which, ring), fd: now };
  };
}
