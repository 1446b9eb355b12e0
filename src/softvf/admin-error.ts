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
