import { Deadline } from "../base/deadline.ts";
import { SystemError, VhostdError } from "../base/errors.ts";
import { OperationQueue } from "../base/operation-queue.ts";
import { checkFd } from "./arguments.ts";
import { CloseLane, OwnedFd } from "./fd.ts";
import { c, check } from "./load.ts";
import { type Watch, watch } from "./poller.ts";
import { shutDown } from "./sys.ts";

/** How a protocol cuts a byte stream into messages. */
export interface Framing {
  /** Bytes. */
  readonly headerSize: number;
  /** Bytes that follow this header. Throws VhostdError protocol for a header that makes no sense. */
  bodySize(header: Uint8Array): number;
  /** The most fds that a message of this protocol may carry. */
  readonly maxFds: number;
  /** Whether a message with this header may carry any; each may, where left out. */
  mayCarryFds?(header: Uint8Array): boolean;
}

/** One message as it arrived. */
export interface Message extends Disposable {
  readonly header: Uint8Array;
  readonly body: Uint8Array;
  /** In the order sent. Who keeps them takes them out (`splice(0)`); the rest is closed on disposal. */
  readonly fds: OwnedFd[];
}

/** One message that was looked at. */
export interface PeekedMessage extends Message {
  /** All of it still lies in the socket, and `fds` are duplicates. */
  readonly left: boolean;
  /**
   * Takes it out of the socket, where it is `left` and the socket is open. Once, before the next one is looked at.
   * @throws VhostdError protocol where the peer has made it disappear
   */
  finish(): void;
}

export interface MessageSocketOptions {
  /** Milliseconds for a message that has begun to be complete; 10 s. */
  readonly partialTimeout?: number;
  /** Milliseconds for a message to be taken by the socket; 10 s. */
  readonly sendTimeout?: number;
  /** A message that is looked at has to be taken out of the socket, because it did not come in one piece. */
  beforeTaking?(): void;
}

/** What has arrived of a message whose header is not complete. */
interface Begun {
  readonly header: Uint8Array;
  /** Bytes of the header that are not in the socket any more. */
  taken: number;
  readonly fds: OwnedFd[];
}

const EAGAIN = 11;
const EMFILE = 24;
const EPIPE = 32;
const ECONNRESET = 104;
/** The most fds that the kernel puts into one message (SCM_MAX_FD). */
const MOST_FDS = 253;
/** Milliseconds between two looks at a header of which a part is there: the poller would report that part for ever. */
const HEADER_INTERVAL = 2;
/** Milliseconds between two looks at what is still being closed. */
const CLOSE_INTERVAL = 5;
/** Messages taken one after the other before other work of the event loop has its turn: a peer may never pause. */
const MESSAGES_A_TURN = 16;
/** Filled by one receive call and read before the next: an array for each message would be its greatest cost. */
const arrivedFds = new Int32Array(MOST_FDS);
const arrivedCount = new Int32Array(1);
/** One element: bun:ffi has no address of an empty array. */
const NO_FDS = new Int32Array(1);

/** Messages with fds over a unix stream socket. */
export class MessageSocket implements Disposable {
  private owned: OwnedFd | undefined;
  /** Also of the fds that arrive: what a peer has sent is closed in one lane. */
  private readonly lane: CloseLane;
  private readonly partialTimeout: number;
  private readonly sendTimeout: number;
  private readonly readable: Readiness;
  private readonly writable: Readiness;
  private readonly sending = new OperationQueue();
  private receiving = false;
  private takenThisTurn = 0;
  /** Why nothing can be sent any more: a message went out in part. */
  private broken: unknown;

  /** Takes over a connected stream socket. */
  constructor(
    fd: OwnedFd,
    private readonly framing: Framing,
    private readonly options: MessageSocketOptions = {},
  ) {
    this.owned = fd;
    this.lane = fd.lane ?? new CloseLane();
    this.partialTimeout = options.partialTimeout ?? 10_000;
    this.sendTimeout = options.sendTimeout ?? 10_000;
    this.readable = new Readiness(fd.number, "in");
    this.writable = new Readiness(fd.number, "out");
  }

  /** Disposed of or abandoned. */
  get closed(): boolean {
    return this.owned === undefined;
  }

  /** Borrowed. @throws VhostdError cancelled after disposal */
  get fd(): number {
    if (this.owned === undefined) throw closedError();
    return this.owned.number;
  }

  /** The peer sends nothing more. What it sent before may still lie in the socket. @throws VhostdError cancelled */
  get hungUp(): boolean {
    return check(c.vhostd_is_hung_up(this.fd), "poll") > 0;
  }

  /**
   * The next message, or undefined when the peer hung up between two messages. Nothing is taken from the socket before
   * this is called, and never more than one message. After an error the place in the stream is lost: close the socket.
   * @throws VhostdError protocol (framing, too many fds), connectionLost (hang-up in the middle of a message), timedOut
   * (a message began and was not completed, or fds that came before cannot be closed), cancelled (closed meanwhile);
   * SystemError EMFILE (no room for its fds)
   */
  receive(): Promise<Message | undefined> {
    return this.next((begun, bodySize) => this.take(begun, bodySize));
  }

  /**
   * As `receive`, and leaves the message in the socket until it is finished, for whoever comes after this process: where it
   * came in one piece, which has its fds, too. Any other is taken out.
   */
  peek(): Promise<PeekedMessage | undefined> {
    return this.next(async (begun, bodySize) => {
      const whole = begun.taken === 0 ? this.look(begun, bodySize) : undefined;
      if (whole !== undefined) return whole;
      if (begun.taken === 0) this.options.beforeTaking?.();
      return { ...(await this.take(begun, bodySize)), left: false, finish() {} };
    });
  }

  /** Whether exactly these bytes lie first in the socket. */
  startsWith(bytes: Uint8Array): boolean {
    const first = this.first(bytes.length);
    return first.length === bytes.length && first.every((byte, at) => byte === bytes[at]);
  }

  /** The bytes that lie first in the socket, which may be fewer than `size`. */
  first(size: number): Uint8Array {
    const bytes = new Uint8Array(size);
    return bytes.subarray(0, Math.max(0, Number(c.vhostd_peek(this.fd, bytes, size))));
  }

  /** Calls for the message that has begun, its header filled in; `complete` is given the size of its body, bytes. */
  private async next<T>(complete: (begun: Begun, bodySize: number) => Promise<T>): Promise<T | undefined> {
    if (this.receiving) throw new VhostdError("invalid", "receive() is called while another is waiting");
    this.receiving = true;
    try {
      if (++this.takenThisTurn > MESSAGES_A_TURN) {
        await new Promise(setImmediate);
        this.takenThisTurn = 0;
      }
      if (this.lane.full) await this.awaitCloses();
      const begun: Begun = { header: new Uint8Array(this.framing.headerSize), taken: 0, fds: [] };
      try {
        if (!(await this.peekHeader(begun))) return undefined;
        const bodySize = this.framing.bodySize(begun.header);
        if (!Number.isSafeInteger(bodySize) || bodySize < 0) {
          throw new VhostdError("protocol", `message announces a body of ${bodySize} bytes`);
        }
        return await complete(begun, bodySize);
      } catch (error) {
        closeAll(begun.fds);
        throw error;
      }
    } finally {
      this.receiving = false;
    }
  }

  private async awaitCloses(): Promise<void> {
    const deadline = Deadline.after(this.partialTimeout, "closing of the fds that this peer has sent");
    await deadline.poll(() => (this.owned === undefined || !this.lane.full ? true : undefined), CLOSE_INTERVAL);
  }

  /** Fills in the header, which stays in the socket as far as possible. False: the peer hung up before. */
  private async peekHeader(begun: Begun): Promise<boolean> {
    const { header } = begun;
    let deadline: Deadline | undefined;
    for (;;) {
      // Asked for first: what the peer sent before it hung up is then seen below.
      const ended = deadline !== undefined && check(c.vhostd_is_hung_up(this.fd), "poll") > 0;
      const rest = from(header, begun.taken);
      const count = Number(c.vhostd_peek(this.fd, rest, rest.length));
      if (count === rest.length) return true;
      if (count === 0 || count === -ECONNRESET) {
        if (begun.taken > 0) throw lostError(begun.taken, header.length);
        return false;
      }
      if (count === -EAGAIN) {
        await this.readable.wait(deadline);
        this.takenThisTurn = 0;
        continue;
      }
      check(count, "peek at a message");
      if (Number(c.vhostd_unread(this.fd)) > count) {
        // A look ends where bytes came with fds: these are taken, so that the next look begins there.
        if (begun.taken === 0) this.options.beforeTaking?.();
        begun.taken += check(
          this.read(c.vhostd_receive, rest.subarray(0, count), begun.fds),
          "receive a part of a header",
        );
        continue;
      }
      if (ended) throw lostError(begun.taken + count, header.length);
      deadline ??= Deadline.after(this.partialTimeout, "arrival of a message's header");
      deadline.check();
      await Bun.sleep(HEADER_INTERVAL);
    }
  }

  /** The message as it lies in the socket; undefined where that does not show all of it and all of its fds. */
  private look({ header, fds }: Begun, bodySize: number): PeekedMessage | undefined {
    const size = header.length + bodySize;
    // One byte more, which is seen where the look did not end at the message.
    const bytes = new Uint8Array(size + 1);
    const count = this.read(c.vhostd_peek_message, bytes, fds);
    if (count === -EMFILE) check(count, "look at a message with file descriptors");
    // The fds may then be those of a later message.
    const isUnclear = count > size && fds.length > 0;
    if (isUnclear) closeAll(fds);
    const mayCarryFds = this.framing.mayCarryFds?.(header) ?? true;
    if (count < size || (isUnclear && mayCarryFds)) {
      closeAll(fds);
      return undefined;
    }
    return {
      header,
      body: bytes.subarray(header.length, size),
      fds,
      left: true,
      finish: () => this.takeOut(size),
      [Symbol.dispose]: () => closeAll(fds),
    };
  }

  private takeOut(size: number): void {
    if (this.owned !== undefined) takeBytes(this.owned.number, size, this.lane)[Symbol.dispose]();
  }

  private async take({ header, taken: begin, fds }: Begun, bodySize: number): Promise<Message> {
    const headerSize = header.length;
    const bytes = new Uint8Array(headerSize + bodySize);
    bytes.set(header);
    let deadline: Deadline | undefined;
    for (let taken = begin; taken < bytes.length; ) {
      const count = this.read(c.vhostd_receive, from(bytes, taken), fds);
      if (count === -EAGAIN) {
        deadline ??= Deadline.after(this.partialTimeout, `arrival of a message of ${bytes.length} bytes`);
        await this.readable.wait(deadline);
      } else if (count === 0 || count === -ECONNRESET) throw lostError(taken, bytes.length);
      else taken += check(count, "receive a message with file descriptors");
    }
    return {
      header,
      body: bytes.subarray(headerSize),
      fds,
      [Symbol.dispose]: () => closeAll(fds),
    };
  }

  /** The count of bytes read or -errno; the fds that came are added to `fds`, which the caller closes. */
  private read(call: typeof c.vhostd_receive, into: Uint8Array, fds: OwnedFd[], limit = this.framing.maxFds): number {
    arrivedCount[0] = 0;
    const count = Number(call(this.fd, into, into.length, arrivedFds, arrivedCount));
    for (let at = 0; at < arrivedCount[0]!; at++) fds.push(new OwnedFd(arrivedFds[at]!, this.lane));
    if (fds.length > limit)
      throw new VhostdError("protocol", `message carries ${fds.length} fds, the limit is ${limit}`);
    return count;
  }

  /**
   * Sends one message after those sent before. `bytes` and the fds are borrowed until the promise settles, which means
   * that the socket has taken all of it.
   * @throws VhostdError timedOut (the peer does not read), connectionLost, cancelled (closed meanwhile). After a message
   * that went out in part or timed out, every later one fails with the same error.
   */
  send(bytes: Uint8Array, fds: readonly number[] = []): Promise<void> {
    return this.sending.run(() => this.transmit(bytes, fds));
  }

  private async transmit(bytes: Uint8Array, fds: readonly number[]): Promise<void> {
    if (this.broken !== undefined) throw this.broken;
    if (bytes.length === 0) throw new VhostdError("invalid", "a message of no bytes cannot be sent");
    if (fds.length > MOST_FDS) {
      throw new VhostdError("limitExceeded", `message has ${fds.length} fds, the limit is ${MOST_FDS}`);
    }
    const numbers = fds.length === 0 ? NO_FDS : Int32Array.from(fds, checkFd);
    let deadline: Deadline | undefined;
    let sent = 0;
    try {
      while (sent < bytes.length) {
        const rest = from(bytes, sent);
        const count = Number(c.vhostd_send(this.fd, rest, rest.length, numbers, sent === 0 ? fds.length : 0));
        if (count === -EAGAIN) {
          deadline ??= Deadline.after(this.sendTimeout, `sending a message of ${bytes.length} bytes`);
          await this.writable.wait(deadline);
        } else if (count === -EPIPE || count === -ECONNRESET) throw lostError(sent, bytes.length);
        else sent += check(count, "send a message");
      }
    } catch (error) {
      // A system error before the first byte (an fd that is none) leaves the stream whole.
      if (sent > 0 || !(error instanceof SystemError)) this.broken = error;
      throw error;
    }
  }

  /** Stops watching and gives the socket back unclosed. A receive() or send() that waits fails with cancelled. */
  abandon(): OwnedFd {
    if (this.owned === undefined) throw closedError();
    const fd = this.owned;
    this.owned = undefined;
    this.readable[Symbol.dispose]();
    this.writable[Symbol.dispose]();
    return fd;
  }

  /** Ends the stream and closes the socket. A receive() or send() that waits fails with cancelled. */
  [Symbol.dispose](): void {
    if (this.owned === undefined) return;
    shutDown(this.owned.number);
    this.abandon()[Symbol.dispose]();
  }
}

/** Waits for one direction of a socket, one waiter at a time, with one watch for all its life. */
class Readiness implements Disposable {
  private watch: Watch | undefined;
  private waiter: PromiseWithResolvers<void> | undefined;

  constructor(
    private readonly fd: number,
    private readonly direction: "in" | "out",
  ) {}

  /** May resolve without need: look again. */
  async wait(deadline?: Deadline): Promise<void> {
    const waiter = Promise.withResolvers<void>();
    if (this.watch === undefined) this.watch = watch(this.fd, this.direction, () => this.waiter?.resolve());
    else this.watch.rearm();
    this.waiter = waiter;
    try {
      await (deadline === undefined ? waiter.promise : deadline.race(waiter.promise));
    } finally {
      this.waiter = undefined;
    }
  }

  [Symbol.dispose](): void {
    this.watch?.[Symbol.dispose]();
    this.waiter?.reject(closedError());
  }
}

/** What is left of `bytes`; mostly all of it, and then no second view is made. */
function from(bytes: Uint8Array, at: number): Uint8Array {
  return at === 0 ? bytes : bytes.subarray(at);
}

/**
 * Takes bytes out of a stream socket, in which they lie, and drops them.
 * @param lane of the fds that are among them. They come along, although nobody wants them: dropped by the kernel they would be
 *   closed on this thread
 * @returns the fds, to be closed when there is time for it
 * @throws VhostdError io where fewer lay there
 */
export function takeBytes(socket: number, size: number, lane: CloseLane): Disposable {
  using fds = new DisposableStack();
  arrivedCount[0] = 0;
  const count = Number(c.vhostd_receive(socket, new Uint8Array(size), size, arrivedFds, arrivedCount));
  for (let at = 0; at < arrivedCount[0]!; at++) fds.use(new OwnedFd(arrivedFds[at]!, lane));
  // Without room for the fds the bytes have been taken all the same.
  if (count === size || count === -EMFILE) return fds.move();
  throw new VhostdError("io", `of a message of ${size} bytes that lay in the socket ${count} could be taken`);
}

/** As much as a stream socket takes now; the fds go with the first byte. @returns bytes; all of them where the peer is gone */
export function sendAtOnce(socket: number, bytes: Uint8Array, fds: readonly number[] = []): number {
  const numbers = fds.length === 0 ? NO_FDS : Int32Array.from(fds, checkFd);
  const count = Number(c.vhostd_send(socket, bytes, bytes.length, numbers, fds.length));
  if (count === -EAGAIN) return 0;
  return count === -EPIPE || count === -ECONNRESET ? bytes.length : check(count, "send at once");
}

function closeAll(fds: OwnedFd[]): void {
  for (const fd of fds.splice(0)) fd[Symbol.dispose]();
}

function closedError(): VhostdError {
  return new VhostdError("cancelled", "the socket was closed");
}

function lostError(done: number, size: number): VhostdError {
  return new VhostdError("connectionLost", `peer hung up after ${done} of ${size} bytes of a message`);
}
