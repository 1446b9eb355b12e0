import { asError } from "../../base/errors.ts";
import { checkInteger } from "../../native/arguments.ts";
import type { FileAccess, slowAccess } from "../../native/slow.ts";

/** One that waits to be carried out, or is being carried out. */
interface Waiting extends FileAccess {
  settle(result: number | Error): void;
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
    if (this.ended !== undefined) throw this.ended;
    const { promise, resolve, reject } = Promise.withResolvers<number>();
    const settle = (result: number | Error) => (result instanceof Error ? reject(result) : resolve(result));
    this.waiting.push({ ...access, settle });
    this.running ??= this.run();
    return await promise;
  }

  /** `length` bytes, by the widest accesses that are aligned. @throws as make */
  async readBytes(offset: number, length: number): Promise<Uint8Array> {
    const bytes = new Uint8Array(length);
    const parts = pieces(offset, length).map(async (piece) => putValue(bytes, piece, await this.make(piece), offset));
    await Promise.all(parts);
    return bytes;
  }

  /** Accesses that are not answered yet, and all to come, fail with this. One that the kernel is at goes on. */
  end(error: Error): void {
    this.ended ??= error;
    for (const { settle } of [...this.underWay, ...this.waiting.splice(0)]) settle(this.ended);
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
  private async carryOut(accesses: readonly Waiting[]): Promise<void> {
    const results = await this.results(accesses);
    this.underWay = [];
    for (const [index, { settle }] of accesses.entries()) settle(results[index]!);
  }

  private async results(accesses: readonly FileAccess[]): Promise<readonly (number | Error)[]> {
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
