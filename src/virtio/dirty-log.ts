/** Bytes of a page in a dirty log, whatever the machine's own pages have (vhost-user, "Migration"). */
export const LOG_PAGE = 4096;
/** Bytes of guest memory that a byte of the log stands for. */
export const LOG_BYTE = 8 * LOG_PAGE;

/**
 * Memory that a front-end shares so that pages which were written are marked in it: bit n of byte n / 8 is the page n from
 * guest-physical address 0 on. The front-end reads and clears it whenever it likes; marking is one atomic OR a page.
 */
export interface DirtyLog {
  /** Borrowed for the call. */
  readonly fd: number;
  /** Bytes into the file, a multiple of 4096. */
  readonly offset: number;
  /** Bytes. */
  readonly size: number;
}

/** What is to be marked where. */
export interface Tracking {
  readonly log: DirtyLog;
  /** End of guest memory, guest-physical, exclusive; the log has a bit for each page below it. */
  readonly end: number;
  /**
   * Set where the log is no front-end's: nobody clears it, and when its marking ends, all that the device had noted until then
   * is in it. A form is preferred, where the device has one.
   */
  readonly own?: { readonly form?: "bitmap" | "bytemap" };
}
