import type { OwnedFd } from "../../../src/native/fd.ts";
import { eventfd, memfd, openFile, pwrite, socketPair, truncate } from "../../../src/native/sys.ts";
import { fullEventfd } from "../../unit/native/full-eventfd.ts";
import { type FdKind, REGION_SIZE } from "./vhost-user-message.ts";

/** One open file of each kind that a hostile front-end may send; the same are sent again and again. */
export class FdPool implements Disposable {
  private readonly owned = new DisposableStack();
  private readonly fds: Record<FdKind, OwnedFd>;

  constructor() {
    const use = (fd: OwnedFd) => this.owned.use(fd);
    const memory = use(memfd("fuzz", REGION_SIZE));
    const [socket, peer] = socketPair();
    use(peer);
    this.fds = {
      memory,
      eventfd: use(eventfd()),
      "small memory": use(memfd("fuzz-small", 100)),
      "read-only memory": use(openFile(`/proc/self/fd/${memory.number}`, "read")),
      "cut memory": use(memfd("fuzz-cut", REGION_SIZE)),
      "full eventfd": use(fullEventfd()),
      socket: use(socket),
      // A program that runs from a disk, which no file of a temporary directory needs to be on.
      "disk file": use(openFile(process.execPath, "read")),
      directory: use(openFile("/", "read")),
      "null device": use(openFile("/dev/null", "read-write")),
    };
  }

  /** Borrowed. */
  number(kind: FdKind): number {
    return this.fds[kind].number;
  }

  /** New contents of guest memory: 0 for empty rings, another seed for nonsense. */
  fill(seed: number): void {
    const words = new Uint32Array(16 << 10);
    let state = seed;
    // xorshift32 (Marsaglia); 0 stays 0.
    for (let at = 0; at < words.length; at++) {
      state ^= state << 13;
      state ^= state >>> 17;
      state ^= state << 5;
      words[at] = state;
    }
    pwrite(this.fds.memory.number, new Uint8Array(words.buffer), 0);
  }

  /** The file that others were given as guest memory ends early, or not any more. */
  cut(short: boolean): void {
    truncate(this.fds["cut memory"].number, short ? 0 : REGION_SIZE);
  }

  [Symbol.dispose](): void {
    this.owned.dispose();
  }
}
