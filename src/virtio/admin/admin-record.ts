import Type, { type Static } from "typebox";
import { VhostdError } from "../../base/errors.ts";
import type { Json } from "../../base/json.ts";
import { parseStored } from "../../base/stored.ts";
import { isRingSize } from "../split-ring.ts";
import { ADMIN_RING_SIZE } from "./admin-memory.ts";

/**
 * An admin queue as plain data. Beside it go its fds by name: "memory", and "interrupt" where the queue has a vector.
 * The indices and what is in flight are in the memory itself.
 */
const AdminQueueSchema = Type.Object({
  queue: Type.Integer({ minimum: 0, maximum: 0xffff }),
  notifyOff: Type.Integer({ minimum: 0, maximum: 0xffff }),
  iova: Type.Integer({ minimum: 0, maximum: Number.MAX_SAFE_INTEGER }),
  ringSize: Type.Integer({ minimum: ADMIN_RING_SIZE.min, maximum: ADMIN_RING_SIZE.max }),
  /** Why it is dead. */
  dead: Type.Union([Type.Null(), Type.String()]),
});
export type AdminQueueRecord = Static<typeof AdminQueueSchema>;

/** @throws VhostdError invalid */
export function parseAdminQueueRecord(data: Json): AdminQueueRecord {
  const record = parseStored(AdminQueueSchema, data, "the stored admin queue");
  if (isRingSize(record.ringSize)) return record;
  throw new VhostdError("invalid", `the stored admin queue has a ring of ${record.ringSize} entries`);
}
