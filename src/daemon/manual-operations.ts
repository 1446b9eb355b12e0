import type { MapForm } from "../native/dirty-log.ts";
import type { ManualTarget } from "./manual-status.ts";

/** What an operator may do to a managed VF by hand. */

/** To its internal status, or only ask for it. */
export const MANUAL_OPERATIONS = ["status", "run", "quiesce", "freeze"] as const;
export type ManualOperation = (typeof MANUAL_OPERATIONS)[number];

/** To a log of the pages that it writes. */
export const LOGGING_OPERATIONS = ["start-logging", "stop-logging"] as const;
export type LoggingOperation = (typeof LOGGING_OPERATIONS)[number];

export const MAP_FORMS = ["bitmap", "bytemap"] as const satisfies readonly MapForm[];

/** Undefined where the status is only asked for. */
export const MANUAL_STATUS: Readonly<Record<ManualOperation, ManualTarget | undefined>> = {
  status: undefined,
  run: "running",
  quiesce: "quiesced",
  freeze: "freezed",
};

export function isLogging(operation: ManualOperation | LoggingOperation): operation is LoggingOperation {
  return (LOGGING_OPERATIONS as readonly string[]).includes(operation);
}
