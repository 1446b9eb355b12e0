import type { Deadline } from "../../base/deadline.ts";
import { asError, SystemError, VhostdError } from "../../base/errors.ts";
import type { Json } from "../../base/json.ts";
import type { OwnedFd } from "../../native/fd.ts";
import type { PciAddress } from "../address.ts";
import type { AddressSpace, DmaRange } from "../address-space.ts";
import type { BusEntry, Transport } from "../bus.ts";
import type { PciFunction } from "../function.ts";
import { VfioUserFunction } from "./function.ts";

const ENOENT = 2;

/** What to do where a vfio-user server cannot be reached, by errno. */
const FIXES: Readonly<Record<number, string>> = {
  2: "its server has gone away: start it again (vfe-softvf makes the devices directory anew)",
  13: "let this user open the socket of the function's server",
  16: "another process uses the function: end it first, or take another function",
  111: "its server died and left its socket behind: start it again",
};

/** A function that is told of every range by itself, as each vfio-user server is. */
export interface DmaListener extends PciFunction {
  /** Smallest unit of a mapping, bytes. */
  readonly dmaPageSize: number;
  /** Why it is gone, or undefined. */
  readonly gone: Error | undefined;
  dmaMap(range: DmaRange, fd: number, deadline: Deadline): Promise<void>;
  dmaUnmap(range: DmaRange, deadline: Deadline): Promise<void>;
  /** Ends the connection: the function has no memory left then. */
  hangUp(reason: Error): void;
}

/**
 * Address spaces of vfio-user servers. A server that is gone has nothing mapped; one that cannot be made to let go of
 * a range is hung up on, which takes all memory from it and harms no other function of the VM.
 */
export class VfioUserAddressSpace implements AddressSpace {
  /** Addresses are JavaScript numbers; no guest has memory beyond 2^53. */
  readonly ioRanges = [{ start: 0, end: Number.MAX_SAFE_INTEGER }];
  private readonly listeners = new Set<DmaListener>();

  async open({ address, transport }: BusEntry, deadline: Deadline): Promise<PciFunction> {
    try {
      return await VfioUserFunction.connect(address, socketOf(address, transport), deadline);
    } catch (error) {
      const fix = error instanceof SystemError ? FIXES[error.errno] : undefined;
      if (!(error instanceof SystemError) || fix === undefined) throw error;
      throw new SystemError(error.call, error.errno, { fix, cause: error });
    }
  }

  revive({ address }: BusEntry, data: Json, fds: Map<string, OwnedFd>): PciFunction {
    return VfioUserFunction.revive(address, data, fds);
  }

  get pageSize(): number {
    return Math.max(4096, ...[...this.listeners].map((fn) => fn.dmaPageSize));
  }

  async attach(
    fn: PciFunction,
    mapped: readonly (DmaRange & { readonly fd: number })[],
    deadline: Deadline,
  ): Promise<void> {
    const listener = asListener(fn);
    try {
      await settleAll(mapped.map((range) => listener.dmaMap(range, range.fd, deadline)));
    } catch (error) {
      // Without the VM's memory it is of no use, and hanging up takes what it has been given so far.
      listener.hangUp(asError(error));
      throw error;
    }
    this.listeners.add(listener);
  }

  async detach(fn: PciFunction, mapped: readonly DmaRange[], deadline: Deadline): Promise<void> {
    const listener = asListener(fn);
    if (!this.listeners.delete(listener)) return;
    await this.unmapOrHangUp(listener, mapped, deadline);
  }

  /**
   * A server that does not take what others of the VM took is of no use any more and is hung up on: one VF's server
   * never decides about the memory of another VF.
   */
  async map(range: DmaRange, fd: number, deadline: Deadline): Promise<void> {
    const asked = this.present();
    const results = await Promise.allSettled(asked.map((listener) => listener.dmaMap(range, fd, deadline)));
    const taken = results.some(({ status }) => status === "fulfilled");
    let failure: unknown;
    for (const [i, result] of results.entries()) {
      const listener = asked[i]!;
      if (result.status === "fulfilled" || listener.gone !== undefined) continue;
      failure ??= result.reason;
      // A refusal is certain; after a timeout the range may still become mapped.
      const refused = result.reason instanceof VhostdError && result.reason.code === "system";
      if (taken || !refused) listener.hangUp(unwilling(listener, "take", result.reason));
    }
    if (failure !== undefined && !taken) throw failure;
  }

  async unmap(range: DmaRange, deadline: Deadline): Promise<void> {
    await Promise.all(this.present().map((listener) => this.unmapOrHangUp(listener, [range], deadline)));
  }

  /** What a server was asked by the process before this one, it has done before: messages are handled in their order. */
  async unmapIfThere(range: DmaRange, deadline: Deadline): Promise<void> {
    await Promise.all(this.present().map((listener) => this.unmapOrHangUp(listener, [range], deadline, isNotThere)));
  }

  adopt(fn: PciFunction): void {
    this.listeners.add(asListener(fn));
  }

  /** Each server has been told for itself; the connections are the functions' own. */
  [Symbol.dispose](): void {
    this.listeners.clear();
  }

  private present(): DmaListener[] {
    return [...this.listeners].filter(({ gone }) => gone === undefined);
  }

  /** @param isFine of what it answers */
  private async unmapOrHangUp(
    listener: DmaListener,
    ranges: readonly DmaRange[],
    deadline: Deadline,
    isFine: (answer: unknown) => boolean = () => false,
  ): Promise<void> {
    if (listener.gone !== undefined) return;
    const unmap = (range: DmaRange) =>
      listener.dmaUnmap(range, deadline).catch((error) => {
        if (!isFine(error)) throw error;
      });
    try {
      await settleAll(ranges.map(unmap));
    } catch (cause) {
      listener.hangUp(unwilling(listener, "let go of", cause));
    }
  }
}

/** The answer to an unmap of what is not mapped. */
function isNotThere(answer: unknown): boolean {
  return answer instanceof SystemError && answer.errno === ENOENT;
}

function unwilling(listener: DmaListener, what: string, cause: unknown): VhostdError {
  const why = asError(cause).message;
  return new VhostdError("iommuDomain", `${listener.address} would not ${what} guest memory: ${why}`, { cause });
}

/** Like Promise.all, but nothing is under way any more when it settles. */
async function settleAll(work: readonly Promise<void>[]): Promise<void> {
  const failed = (await Promise.allSettled(work)).find((result) => result.status === "rejected");
  if (failed !== undefined) throw failed.reason;
}

function socketOf(address: PciAddress, transport: Transport): string {
  if (transport.kind === "vfio-user") return transport.socket;
  throw new VhostdError("invalid", `${address} is not reached over vfio-user and cannot share this address space`);
}

function asListener(fn: PciFunction): DmaListener {
  if (!("dmaMap" in fn)) {
    throw new VhostdError("invalid", `${fn.address} is not reached over vfio-user and cannot share this address space`);
  }
  return fn as DmaListener;
}
