import { Deadline } from "../../base/deadline.ts";
import { VhostdError } from "../../base/errors.ts";
import { AdminRefusal } from "../admin/admin-request.ts";
import { type InternalStatusName, type SettableStatus, stepsTo } from "../admin/vendor.ts";
import type { VendorAdmin } from "../admin/vendor-admin.ts";

/** Milliseconds to bring the device to rest where the caller's deadline may have passed. */
export const CLEAN_UP_TIMEOUT = 5000;
/** Milliseconds for an answer that can be done without. */
const ASK_TIMEOUT = 1000;

/** The internal status of one VF, and the ways from one to another. */
export class InternalSteps {
  constructor(
    private readonly admin: VendorAdmin,
    private readonly vdevId: number,
    /** For people. */
    private readonly name: string,
  ) {}

  /** A command that may still alter it was not answered, or nothing is any more. */
  get blocked(): boolean {
    return this.admin.obstacle(this.vdevId) !== undefined;
  }

  status(deadline: Deadline): Promise<InternalStatusName> {
    return this.admin.status(this.vdevId, deadline);
  }

  /** From init to freezed, ahead of need. */
  async standBy(deadline: Deadline): Promise<void> {
    await this.admin.modify(this.vdevId, "quiesced", deadline, "ahead");
    await this.admin.modify(this.vdevId, "freezed", deadline, "ahead");
  }

  /** No command that may still alter it is left with the device, or none of it will be answered any more. */
  get settled(): boolean {
    const { queue } = this.admin;
    return queue.state.kind === "dead" || !queue.mayStillAlter(this.vdevId);
  }

  /** From wherever it is. */
  async bringTo(to: SettableStatus, deadline: Deadline): Promise<void> {
    await this.step(await this.status(deadline), to, deadline);
  }

  /** As `bringTo` "freezed", for one that is hardly quiesced: it is asked only where it does not take the first step. */
  async freeze(deadline: Deadline): Promise<void> {
    try {
      await this.admin.modify(this.vdevId, "quiesced", deadline, "once");
    } catch (error) {
      if (!(error instanceof AdminRefusal)) throw error;
      return await this.bringTo("freezed", deadline);
    }
    await this.step("quiesced", "freezed", deadline);
  }

  /** From quiesced, at the first try. @returns false where it refuses: it has not drained */
  async tryFreeze(deadline: Deadline): Promise<boolean> {
    try {
      await this.admin.modify(this.vdevId, "freezed", deadline, "once");
      return true;
    } catch (error) {
      if (!(error instanceof AdminRefusal)) throw error;
      return false;
    }
  }

  /** The way out of it, for one that hardly is anywhere else: it is asked only where it does not take it. */
  async leaveFreezed(deadline: Deadline): Promise<void> {
    try {
      await this.admin.modify(this.vdevId, "quiesced", deadline, "once");
    } catch (error) {
      if (!(error instanceof AdminRefusal)) throw error;
      await this.bringTo("quiesced", deadline);
    }
  }

  async step(from: InternalStatusName, to: SettableStatus, deadline: Deadline): Promise<void> {
    for (const step of stepsTo(from, to)) await this.admin.modify(this.vdevId, step, deadline);
  }

  /** undefined where nobody says it soon. */
  async ask(deadline: Deadline): Promise<InternalStatusName | undefined> {
    const asked = Deadline.after(Math.min(ASK_TIMEOUT, deadline.remaining / 2), `the status of ${this.name}`);
    return this.admin.status(this.vdevId, asked, "ahead").catch(() => undefined);
  }

  /** false also where nobody can say. */
  async isFreezed(deadline: Deadline): Promise<boolean> {
    return (await this.ask(deadline)) === "freezed";
  }

  /** By hand. @throws what the step that failed does; the status is what it was then, or the error says it */
  async change(to: SettableStatus, deadline: Deadline): Promise<void> {
    const from = await this.status(deadline);
    try {
      await this.step(from, to, deadline);
    } catch (cause) {
      if (!(cause instanceof VhostdError)) throw cause;
      const back = Deadline.after(CLEAN_UP_TIMEOUT, `the way back of ${this.name}`);
      if (from !== "init") await this.bringTo(from, back).catch(() => {});
      const now = await this.status(back).catch(() => undefined);
      if (now === from) throw cause;
      const where = now === undefined ? "its status is not known" : `it was ${from} and is ${now}`;
      throw withMore(cause, `; ${where}`);
    }
  }
}

/** A step that the device did not take in time, as one does not that is still busy. */
export function isImpatience(error: unknown): error is VhostdError {
  if (error instanceof AdminRefusal) return !error.final;
  return error instanceof VhostdError && (error.code === "quiesceFailed" || error.code === "freezeFailed");
}

/** @throws what the work does; where it says that it is not able to, with the reason why it was to do it */
export async function withReason(work: () => Promise<void>, reason: () => string): Promise<void> {
  try {
    await work();
  } catch (cause) {
    if (!(cause instanceof VhostdError && cause.code === "notSupported")) throw cause;
    throw withMore(cause, `: ${reason()}`);
  }
}

/** The same error, which says more. */
export function withMore(cause: VhostdError, more: string): VhostdError {
  const { fix, data } = cause;
  return new VhostdError(cause.code === "system" ? cause.number : cause.code, `${cause.message}${more}`, {
    cause,
    ...(fix === undefined ? {} : { fix }),
    ...(data === undefined ? {} : { data }),
  });
}
