import { asError, VhostdError } from "../base/errors.ts";
import { ADMIN_DO_NOT_RETRY, AdminStatus } from "../virtio/admin/vendor.ts";

/** A command of the admin virtqueue that did not succeed. */
export class AdminError extends Error {
  constructor(
    readonly code: Exclude<keyof typeof AdminStatus, "ok">,
    message: string,
    /** It makes sense to send the same command again. */
    readonly retry = false,
  ) {
    super(message);
    this.name = "AdminError";
  }

  /** The last byte of the answer. */
  get status(): number {
    return AdminStatus[this.code] | (this.retry ? 0 : ADMIN_DO_NOT_RETRY);
  }
}

/** What the device refuses, in the words of the admin virtqueue. */
export async function inAdminTerms<T>(run: () => Promise<T>): Promise<T> {
  try {
    return await run();
  } catch (error) {
    const { message } = asError(error);
    const code = error instanceof VhostdError ? error.code : undefined;
    switch (code) {
      case "notPermitted":
        throw new AdminError("error", message);
      case "invalid":
        throw new AdminError("dataTransfer", message);
      case "timedOut":
      case "cancelled":
        throw new AdminError("error", message, true);
      default:
        throw new AdminError("internal", message);
    }
  }
}
