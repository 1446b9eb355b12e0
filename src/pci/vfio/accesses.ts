import { asError } from "../../base/errors.ts";
import { checkInteger } from "../../native/arguments.ts";
import type { FileAccess, slowAccess } from "../../native/slow.ts";

type Result = number | Error;

/** Accesses that wait to be carried out together, or are being carried out. */
interface Waiting {
  readonly accesses: readonly FileAccess[];
  /** @param results one for each access, or why none was made */
  settle(results: readonly Result[] | Error): void;
}

/** What is asked for in this turn of the event loop has been asked for then. */
const nextTurn = () => new Promise<void>((resolve) => setImmediate(resolve));

/**
 * Accesses to the file of a device, off the JavaScript thread: the kernel makes whoever touches a device wait while somebody
 * resets it. In the order in which they were asked for, those of one turn of the event loop in one call; one call at a time.
 */
export class DeviceAccesses {
  private waiting: Waiting[] = [];
  private underWay: readonly Waiting[] = [];
  private running: Promise<void> | undefined;
  private ended: Error | undefined;

  /** @param fd of the device, borrowed for each call */
  constructor(
    private readonly fd: () => number,
    private readonly call: typeof slowAccess,
  ) {}

  /** No access waits, and none is being carried out. */
  get idle(): boolean {
    return this.waiting.length === 0 && this.underWay.length === 0;
  }

  /** @returns the value. @throws SystemError; VhostdError io, invalid; what `end` was given */
  async make(access: FileAccess): Promise<number> {
    const { value, width } = access;
    // One that cannot be meant must not fail the call, which has others in it.
    if (value !== undefined) checkInteger(value, 0, 2 ** (8 * width) - 1, "value of a register");
    const [result] = await this.add([access]);
    if (result instanceof Error) throw result;
    return result!;
  }

  /** `length` bytes, by the widest accesses that are aligned. @throws as make */
  async readBytes(offset: number, length: number): Promise<Uint8Array> {
    const bytes = new Uint8Array(length);
    const parts = pieces(offset, length);
    const results = await this.add(parts);
    for (const [index, piece] of parts.entries()) {
      const result = results[index]!;
      if (result instanceof Error) throw result;
      putValue(bytes, piece, result, offset);
    }
    return bytes;
  }

  /** Accesses that are not answered yet, and all to come, fail with this. One that the kernel is at goes on. */
  end(error: Error): void {
    this.ended ??= error;
    for (const { settle } of [...this.underWay, ...this.waiting.splice(0)]) settle(this.ended);
  }

  /** @throws what `end` was given */
  private async add(accesses: readonly FileAccess[]): Promise<readonly Result[]> {
    if (this.ended !== undefined) throw this.ended;
    const { promise, resolve, reject } = Promise.withResolvers<readonly Result[]>();
    const settle = (results: readonly Result[] | Error) =>
      results instanceof Error ? reject(results) : resolve(results);
    this.waiting.push({ accesses, settle });
    this.running ??= this.run();
    return await promise;
  }

  /** Until the kernel is at none any more. After the end. */
  async settled(): Promise<void> {
    await this.running;
  }

  private async run(): Promise<void> {
    while (this.waiting.length > 0) {
      await nextTurn();
      this.underWay = this.waiting.splice(0);
      // Nothing: it was ended meanwhile.
      if (this.underWay.length > 0) await this.carryOut(this.underWay);
    }
    this.running = undefined;
  }

  /** Never rejects. */
  private async carryOut(waiting: readonly Waiting[]): Promise<void> {
    const results = await this.results(waiting.flatMap(({ accesses }) => accesses));
    this.underWay = [];
    let at = 0;
    for (const { accesses, settle } of waiting) {
      settle(results.slice(at, at + accesses.length));
      at += accesses.length;
    }
  }

  private async results(accesses: readonly FileAccess[]): Promise<readonly Result[]> {
    try {
      return await this.call(this.fd(), accesses);
    } catch (error) {
      return accesses.map(() => asError(error));
    }
  }
}

/** `length` bytes at `offset` by the widest accesses that are aligned. */
export function pieces(offset: number, length: number): { readonly offset: number; readonly width: 1 | 2 | 4 }[] {
  const found: { offset: number; width: 1 | 2 | 4 }[] = [];
  const end = offset + length;
  for (let at = offset; at < end; at += found.at(-1)!.width) {
    found.push({ offset: at, width: at % 4 === 0 && end - at >= 4 ? 4 : at % 2 === 0 && end - at >= 2 ? 2 : 1 });
  }
  return found;
}

/** Puts what an access of `pieces` read to its place in `bytes`, which begin at `begin`. */
export function putValue(
  bytes: Uint8Array,
  { offset, width }: { readonly offset: number; readonly width: number },
  value: number,
  begin: number,
): void {
  for (let i = 0; i < width; i++) bytes[offset - begin + i] = value >>> (8 * i);
}
