import { Deadline } from "../../base/deadline.ts";
import { asError } from "../../base/errors.ts";
import type { Logger } from "../../base/log.ts";
import type { PciAddress } from "../../pci/address.ts";
import type { DeviceTable } from "../device-table.ts";
import type { Pf } from "../pf.ts";
import { leftOf } from "../presence.ts";

export interface PfRenewal {
  readonly table: DeviceTable;
  readonly add: (address: PciAddress) => Promise<unknown>;
  readonly log: Logger;
  /** For a sign of life of a PF, milliseconds. */
  readonly time: number;
}

/**
 * PFs that have vanished while no daemon was there are attached anew, where no VF goes on that they could reset. Never rejects.
 * @param others that were let go of, because their records are of another version
 */
export async function renewPfs(renewal: PfRenewal, others: readonly PciAddress[]): Promise<void> {
  const { table } = renewal;
  const here = [...table.vfs.values()].filter(({ slot }) => leftOf(slot) === undefined);
  const used = new Set(here.map(({ pf }) => pf));
  const unused = table.livePfs.filter(({ address }) => !used.has(address));
  const wanted = others.filter((address) => !used.has(address) && !table.pfs.has(address));
  await Promise.all([
    ...unused.map((pf) => renewPf(renewal, pf)),
    ...wanted.map((address) => attach(renewal, address, async () => {})),
  ]);
}

async function renewPf(renewal: PfRenewal, pf: Pf): Promise<void> {
  const { address } = pf;
  await pf.look(Deadline.after(renewal.time, `a sign of life of ${address}`));
  if (pf.reason === null) return;
  await attach(renewal, address, async () => {
    renewal.table.pfs.set(address, "removing");
    await pf[Symbol.asyncDispose]();
    await pf.late;
  });
}

async function attach({ table, add, log }: PfRenewal, address: PciAddress, before: () => Promise<void>): Promise<void> {
  const own = log.child(`pf ${address}`);
  try {
    own.warn("it is attached anew");
    await before();
    await add(address);
  } catch (error) {
    table.pfs.delete(address);
    own.error("could not be attached anew", asError(error));
  }
}
