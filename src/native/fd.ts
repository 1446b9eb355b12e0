import { VhostdError } from "../base/errors.ts";
import { checkFd } from "./arguments.ts";
import { c, check } from "./load.ts";
import { onStop } from "./stop.ts";

let live = 0;
/** How often each number has been given an owner. */
const owners: number[] = [];

/** The count of OwnedFds that are open in this process, for tests of leaks. */
export function liveFds(): number {
  return live;
}

/** The count of files that were disposed of and whose lanes have not closed them yet. */
export function pendingCloses(): number {
  return Number(c.vhostd_pending_closes(0));
}

/** Files of a lane that wait to be closed, at most; beyond that its peer is served no further. */
const PENDING_MAX = 1024;
/** Milliseconds that the end of the program waits for closes. */
const STOP_PATIENCE = 1000;
let stopping = false;

/**
 * Where files are closed that another process had a hand in, on threads of native/: what such a close does is that
 * process's choice, and it may take for ever. Files of one lane are closed one after the other, so what one peer sends
 * should be in one lane.
 */
export class CloseLane {
  private readonly number = Number(c.vhostd_new_lane());

  /** Nothing more should be taken from this peer: too much of what it sent is still being closed. */
  get full(): boolean {
    return Number(c.vhostd_pending_closes(this.number)) > PENDING_MAX;
  }

  /** All files that were disposed of are closed. */
  get idle(): boolean {
    return Number(c.vhostd_pending_closes(this.number)) === 0;
  }

  /** For OwnedFd: takes over an open fd. */
  close(fd: number): void {
    if (!stopping) {
      stopping = true;
      onStop(() => {
        c.vhostd_wait_for_closes(STOP_PATIENCE);
        stopping = false;
      });
    }
    c.vhostd_close_later(this.number, fd);
  }
}

/** The one owner of a file descriptor: closes it once, when disposed of. */
export class OwnedFd implements Disposable {
  private held: number | undefined;

  /**
   * Takes over an open fd.
   * @param lane where it is closed; undefined where no other process had a hand in the file, which is closed at once
   * @throws VhostdError invalid where `number` cannot be an fd
   */
  constructor(
    number: number,
    readonly lane?: CloseLane,
  ) {
    this.held = checkFd(number);
    owners[number] = (owners[number] ?? 0) + 1;
    live++;
  }

  /** The number, borrowed: it is another file's after this owner has let go. @throws VhostdError invalid when closed */
  get number(): number {
    if (this.held === undefined) throw new VhostdError("invalid", "file descriptor is used after it was closed");
    return this.held;
  }

  get closed(): boolean {
    return this.held === undefined;
  }

  /** A second fd of the same open file, close-on-exec, in the same lane. @throws SystemError */
  dup(): OwnedFd {
    return new OwnedFd(duplicateNumber(this.number), this.lane);
  }

  /** A new owner in the place of this one, which closes in another lane. @throws VhostdError invalid when closed */
  inLane(lane: CloseLane): OwnedFd {
    return new OwnedFd(this.release(), lane);
  }

  /** Gives the number to the caller, who closes it from now on. @throws VhostdError invalid when closed */
  release(): number {
    const number = this.number;
    this.held = undefined;
    live--;
    return number;
  }

  /** Closes, at once or in its lane. A second time does nothing. */
  [Symbol.dispose](): void {
    if (this.held === undefined) return;
    const number = this.release();
    // The result says how writing back went (network file systems); the fd is gone in any case.
    if (this.lane === undefined) c.vhostd_close(number);
    else this.lane.close(number);
  }
}

/** Tells the file of an owned fd from all others that have had its number before or will have it. */
export function fileIdentity(fd: number): number {
  return fd * 2 ** 32 + (owners[fd] ?? 0);
}

/** A descriptor of our own for a file that was lent to us and may be anybody's. @throws SystemError */
export function duplicate(fd: number): OwnedFd {
  return new OwnedFd(duplicateNumber(fd), new CloseLane());
}

function duplicateNumber(fd: number): number {
  return check(c.vhostd_dup(checkFd(fd)), "dup");
}
