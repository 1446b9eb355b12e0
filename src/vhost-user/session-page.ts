import { VhostdError } from "../base/errors.ts";
import { struct } from "../base/layout.ts";
import type { OwnedFd } from "../native/fd.ts";
import { fileInfo, memfd, pread, pwrite } from "../native/sys.ts";

/** Bytes: within one page a write is done or not, however the process dies. */
const PAGE_SIZE = 4096;

/** What the page begins with; the bytes of the message that is answered follow, as far as there is room. */
const NOTE = struct("note of a session", 8, { stage: [0, "u32"], length: [4, "u32"] });

/** Where the page ends: a note is written without it, and it without a note. */
const ATTEMPTS = struct("attempts to take up a session", 4, { attempts: [0, "u32"] });
const ATTEMPTS_AT = PAGE_SIZE - ATTEMPTS.size;
/** Bytes. */
const ROOM = ATTEMPTS_AT - NOTE.size;

const Stage = { none: 0, taken: 1, answering: 2 } as const;

/**
 * What a process was at with a message when it died, where the socket does not say it. `taken`: a message was taken out of
 * the socket and is not done with. `answering`: the answer to the message that begins with `bytes`, and is still in the
 * socket, was sent or not.
 */
export type PageNote =
  | { readonly stage: "none" }
  | { readonly stage: "taken" }
  | { readonly stage: "answering"; readonly bytes: Uint8Array };

const CLEAR = new Uint8Array(NOTE.size);

/** How often the session of this page was taken up by a process that has not finished anything of it. @throws SystemError */
export function attemptsOf(page: OwnedFd): number {
  const bytes = new Uint8Array(ATTEMPTS.size);
  pread(page.number, bytes, ATTEMPTS_AT);
  return ATTEMPTS.read(bytes).attempts;
}

/** A page that outlives the process: beside the record of a session, and cheaper to write. */
export class SessionPage implements Disposable {
  private noted = false;
  private attempted = 0;

  private constructor(private readonly file: OwnedFd) {}

  static create(): SessionPage {
    return new SessionPage(memfd("vhostd-session", PAGE_SIZE));
  }

  /** @param file owned by the page where this does not throw; VhostdError invalid where it is none */
  static revive(file: OwnedFd | undefined): SessionPage {
    if (file === undefined) throw new VhostdError("invalid", "the stored session lacks the fd page");
    const { kind, filesystem, size } = fileInfo(file.number);
    if (kind !== "regular" || filesystem !== "tmpfs" || size !== PAGE_SIZE) {
      throw new VhostdError(
        "invalid",
        `the page of the stored session is of kind ${kind} on ${filesystem} with ${size} bytes, must be a memory file of ${PAGE_SIZE}`,
      );
    }
    const page = new SessionPage(file);
    page.noted = page.note.stage !== "none";
    page.attempted = attemptsOf(file);
    return page;
  }

  get fd(): number {
    return this.file.number;
  }

  /** @throws VhostdError invalid where nobody has written that */
  get note(): PageNote {
    const bytes = new Uint8Array(PAGE_SIZE);
    pread(this.fd, bytes, 0);
    const { stage, length } = NOTE.read(bytes);
    if (stage === Stage.none) return { stage: "none" };
    if (stage === Stage.taken) return { stage: "taken" };
    if (stage === Stage.answering && length > 0 && length <= ROOM) {
      return { stage: "answering", bytes: bytes.subarray(NOTE.size, NOTE.size + length) };
    }
    throw new VhostdError("invalid", `the page of the stored session says stage ${stage} and ${length} bytes`);
  }

  /** As of `attemptsOf`. */
  get attempts(): number {
    return this.attempted;
  }

  /** This process takes the session up. */
  noteAttempt(): void {
    this.writeAttempts(this.attempted + 1);
  }

  noteTaken(): void {
    this.write(NOTE.encode({ stage: Stage.taken }));
    this.noted = true;
  }

  noteAnswering(header: Uint8Array, payload: Uint8Array): void {
    const length = Math.min(header.length + payload.length, ROOM);
    const bytes = new Uint8Array(NOTE.size + length);
    NOTE.write(bytes, { stage: Stage.answering, length });
    bytes.set(header, NOTE.size);
    bytes.set(payload.subarray(0, length - header.length), NOTE.size + header.length);
    this.write(bytes);
    this.noted = true;
  }

  /** Something is finished, or nothing was to be done. Costs nothing where nothing is noted. */
  clear(): void {
    if (this.noted) this.write(CLEAR);
    this.noted = false;
    if (this.attempted > 0) this.writeAttempts(0);
  }

  [Symbol.dispose](): void {
    this.file[Symbol.dispose]();
  }

  private writeAttempts(attempts: number): void {
    this.write(ATTEMPTS.encode({ attempts }), ATTEMPTS_AT);
    this.attempted = attempts;
  }

  private write(bytes: Uint8Array, at = 0): void {
    const count = pwrite(this.fd, bytes, at);
    if (count !== bytes.length)
      throw new VhostdError("io", `${count} of ${bytes.length} bytes of a session's page written`);
  }
}
