/** ok: as it should be; warn: works, with a limit or a risk; bad: something will not work. */
export type Level = "ok" | "warn" | "bad";

/** What one check has found. */
export interface Finding {
  readonly level: Level;
  /** What was looked at, a few words: "IOMMU". */
  readonly check: string;
  /** What was seen, a sentence without its end. */
  readonly seen: string;
  /** What to do about it; always there unless ok. */
  readonly fix?: string;
}

export function ok(check: string, seen: string): Finding {
  return { level: "ok", check, seen };
}

export function warn(check: string, seen: string, fix: string): Finding {
  return { level: "warn", check, seen, fix };
}

export function bad(check: string, seen: string, fix: string): Finding {
  return { level: "bad", check, seen, fix };
}
