import { VhostdError } from "../base/errors.ts";

/** Bounds of what a peer may make this process hold and do. */
export interface MessageLimits {
  /** Bytes of one message. */
  readonly size: number;
  /** Objects and arrays inside one another. */
  readonly depth: number;
}

export const REQUEST_LIMITS: MessageLimits = { size: 1 << 20, depth: 64 };

const QUOTE = 0x22;
const BACKSLASH = 0x5c;
const OPEN_BRACE = 0x7b;
const CLOSE_BRACE = 0x7d;
const OPEN_BRACKET = 0x5b;
const CLOSE_BRACKET = 0x5d;
const WHITE_SPACE = new Set([0x20, 0x09, 0x0a, 0x0d]);

const INITIAL_BUFFER = 4096;

/**
 * Finds the ends of JSON objects in a byte stream without framing: an object may arrive in many pieces, many objects in
 * one. It looks at quotes, escapes and brackets only; whether the text between them is JSON is for the parser to say.
 */
export class MessageSplitter {
  private buffer = new Uint8Array(INITIAL_BUFFER);
  private length = 0;
  private depth = 0;
  private inString = false;
  private escaped = false;

  constructor(private readonly limits: MessageLimits = REQUEST_LIMITS) {}

  /** A message has begun and is not complete. */
  get partial(): boolean {
    return this.depth > 0;
  }

  /**
   * The messages that `chunk` completes, one by one, so that the caller decides how fast they are taken.
   * @throws VhostdError protocol where the stream cannot be split any further: the connection has to end
   */
  *push(chunk: Uint8Array): Generator<Uint8Array, void, void> {
    let begin = 0;
    for (let at = 0; at < chunk.length; at++) {
      const byte = chunk[at]!;
      if (this.depth === 0) {
        if (WHITE_SPACE.has(byte)) continue;
        if (byte !== OPEN_BRACE && byte !== OPEN_BRACKET) {
          throw new VhostdError("protocol", `a message begins with byte 0x${byte.toString(16)}, expected "{"`);
        }
        begin = at;
        this.depth = 1;
      } else if (this.ends(byte)) {
        this.append(chunk.subarray(begin, at + 1));
        const message = this.buffer.slice(0, this.length);
        this.length = 0;
        yield message;
      }
    }
    if (this.partial) this.append(chunk.subarray(begin));
  }

  /** Takes one more byte of the message begun; true where it is its last. */
  private ends(byte: number): boolean {
    if (this.inString) {
      if (this.escaped) this.escaped = false;
      else if (byte === BACKSLASH) this.escaped = true;
      else if (byte === QUOTE) this.inString = false;
      return false;
    }
    switch (byte) {
      case QUOTE:
        this.inString = true;
        return false;
      case OPEN_BRACE:
      case OPEN_BRACKET:
        if (++this.depth > this.limits.depth) {
          throw new VhostdError("limitExceeded", `a message is nested deeper than ${this.limits.depth} levels`);
        }
        return false;
      case CLOSE_BRACE:
      case CLOSE_BRACKET:
        return --this.depth === 0;
      default:
        return false;
    }
  }

  private append(bytes: Uint8Array): void {
    const length = this.length + bytes.length;
    if (length > this.limits.size) {
      throw new VhostdError("limitExceeded", `a message is longer than ${this.limits.size} bytes`);
    }
    if (length > this.buffer.length) {
      const larger = new Uint8Array(Math.min(this.limits.size, Math.max(length, this.buffer.length * 2)));
      larger.set(this.buffer.subarray(0, this.length));
      this.buffer = larger;
    }
    this.buffer.set(bytes, this.length);
    this.length = length;
  }
}
