import { VhostdError } from "../base/errors.ts";
import { checkFd } from "./arguments.ts";
import { c, check } from "./load.ts";

let live = 0;

/** The count of OwnedFds that are open in this process, for tests of leaks. */
export function liveFds(): number {
  return live;
}

/** The one owner of a file descriptor: closes it once, when disposed of. */
export class OwnedFd implements Disposable {
  private held: number | undefined;

  /** Takes over an open fd. @throws VhostdError invalid where `number` cannot be one */
  constructor(number: number) {
    this.held = checkFd(number);
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

  /** A second fd of the same open file, close-on-exec. @throws SystemError */
  dup(): OwnedFd {
    return duplicate(this.number);
  }

  /** Gives the number to the caller, who closes it from now on. @throws VhostdError invalid when closed */
  release(): number {
    const number = this.number;
    this.held = undefined;
    live--;
    return number;
  }

  /** Closes. A second time does nothing. */
  [Symbol.dispose](): void {
    if (this.held === undefined) return;
    // The result says how writing back went (network file systems); the fd is gone in any case.
    c.vhostd_close(this.release());
  }
}

/** A descriptor of our own for a file that was lent to us. @throws SystemError */
export function duplicate(fd: number): OwnedFd {
  return new OwnedFd(check(c.vhostd_dup(checkFd(fd)), "dup"));
}
