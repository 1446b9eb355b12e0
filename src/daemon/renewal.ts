import { setTimeout as pause } from "node:timers/promises";
import { asError, sentence } from "../base/errors.ts";
import type { Json } from "../base/json.ts";
import type { Logger } from "../base/log.ts";
import type { LinkRecord } from "./link.ts";
import type { Migration } from "./migration.ts";
import type { OpenRings } from "./open-rings.ts";

/** What outlives the VF that it was found out by: of one that was here before, or is opened again. */
export interface VfBefore {
  readonly rings?: OpenRings | undefined;
  /** The same, of an earlier process. */
  readonly storedRings?: Json | undefined;
  readonly link?: LinkRecord | undefined;
  /** How its last session ended. */
  readonly trouble?: string | undefined;
  readonly migration?: Migration | undefined;
}

/** A VF whose function is opened again. */
export interface RenewedVf {
  /** Closes the function; nobody is served any more. */
  retire(): Promise<void>;
  /** It cannot be opened yet, and why. */
  hindered(reason: string): void;
}

export interface RenewalOptions<T extends RenewedVf> {
  readonly old: T;
  /** Opens the function for a VF that takes its place. */
  readonly open: () => Promise<T>;
  readonly onOpened: (vf: T) => void;
  readonly log: Logger;
  /** Between two attempts, milliseconds. */
  readonly interval: number;
}

/**
 * A function that was given away, closed and opened again before its next front-end. A front-end that has its doorbells has
 * the function's file, and can drive it with whatever memory is mapped, long after its own session. The kernel opens a
 * function only when nobody else has it open: so it is tried until that is so.
 */
export class Renewal<T extends RenewedVf> {
  private readonly ending = new AbortController();
  private readonly done: Promise<void>;

  constructor(private readonly options: RenewalOptions<T>) {
    this.done = this.run();
  }

  /** No more attempts; resolves when none is under way. The old VF is left as it is, or the new one is there. */
  async end(): Promise<void> {
    this.ending.abort();
    await this.done;
  }

  private async run(): Promise<void> {
    const { old, log } = this.options;
    const { signal } = this.ending;
    const ended = new Promise<void>((resolve) => signal.addEventListener("abort", () => resolve(), { once: true }));
    const retired = old.retire().catch((error) => log.warn("not all of it could be let go of", asError(error)));
    // A kernel that takes its time to close it is not waited for in the end.
    await Promise.race([retired, ended]);
    let known: string | undefined;
    while (!signal.aborted) {
      const error = await this.open().then(() => undefined, asError);
      if (error === undefined) return;
      const reason = sentence(error);
      if (reason !== known)
        log.warn(`cannot be opened again for its next front-end; tried every ${this.options.interval} ms`, error);
      known = reason;
      old.hindered(`waits to be opened again: ${reason}`);
      await pause(this.options.interval, undefined, { signal }).catch(() => {});
    }
  }

  private async open(): Promise<void> {
    this.options.onOpened(await this.options.open());
  }
}
