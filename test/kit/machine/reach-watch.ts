import { Deadline } from "../../../src/base/deadline.ts";
import { type Extent, subtract } from "../../../src/pci/ranges.ts";
import type { IommuView, Translation } from "./iommu-view.ts";

/** Milliseconds until what a daemon undoes is undone, on a machine that is emulated. */
const SETTLING = 30_000;

/**
 * Holds functions to what their guests have given, as the IOMMU sees it: after each step exactly that is reachable, and
 * at no moment of the step anything that was given neither before nor after it.
 */
export class ReachWatch {
  private readonly given = new Map<string, readonly Extent[]>();

  constructor(
    private readonly view: IommuView,
    addresses: readonly string[],
  ) {
    for (const address of addresses) this.given.set(address, []);
  }

  /**
   * @param after what functions may reach once `action` has ended, by address; those that are left out, as before
   * @throws Error naming the step, the function and what it reached
   */
  async step<T>(
    what: string,
    after: Readonly<Record<string, readonly Extent[]>>,
    action: () => Promise<T> | T,
  ): Promise<T> {
    const before = new Map(this.given);
    for (const [address, extents] of Object.entries(after)) this.given.set(address, extents);
    let ended = false;
    const running = (async () => action())().finally(() => {
      ended = true;
    });
    const watching = (async () => {
      while (!ended) {
        for (const [address, extents] of this.given) {
          const allowed = [...extents, ...(before.get(address) ?? [])];
          const beyond = excess(await this.view.reach(address), allowed);
          if (beyond !== undefined) throw new Error(`during "${what}" ${address} reaches ${beyond}`);
        }
      }
    })();
    const [result] = await Promise.all([running, watching]);
    for (const [address, extents] of this.given) await this.settle(what, address, extents);
    return result;
  }

  private async settle(what: string, address: string, extents: readonly Extent[]): Promise<void> {
    let seen = "";
    await Deadline.after(SETTLING, `"${what}": what ${address} reaches`)
      .poll(async () => {
        const reach = await this.view.reach(address);
        seen = describe(reach);
        const missing = reach.kind === "ranges" ? extents.flatMap((one) => subtract(one, reach.ranges)) : extents;
        return (excess(reach, extents) === undefined && missing.length === 0) || undefined;
      }, 50)
      .catch((cause) => {
        throw new Error(`after "${what}" ${address} reaches ${seen}, not ${describeExtents(extents)}`, { cause });
      });
  }
}

/** What is reached and not allowed, for people; undefined where that is nothing. */
function excess(reach: Translation, allowed: readonly Extent[]): string | undefined {
  if (reach.kind === "nothing") return undefined;
  if (reach.kind === "everything") return "everything";
  const beyond = reach.ranges.flatMap((one) => subtract(one, allowed));
  return beyond.length === 0 ? undefined : describeExtents(beyond);
}

function describe(reach: Translation): string {
  return reach.kind === "ranges" ? describeExtents(reach.ranges) : reach.kind;
}

function describeExtents(extents: readonly Extent[]): string {
  if (extents.length === 0) return "nothing";
  return extents.map(({ start, end }) => `0x${start.toString(16)}–0x${end.toString(16)}`).join(", ");
}
