import { Deadline } from "../../../src/base/deadline.ts";
import { VhostdError } from "../../../src/base/errors.ts";
import { silentLogger } from "../../../src/base/log.ts";
import { liveFds, type OwnedFd } from "../../../src/native/fd.ts";
import { fileInfo, memfd } from "../../../src/native/sys.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import type { DmaRange } from "../../../src/pci/address-space.ts";
import { Bus, type BusEntry } from "../../../src/pci/bus.ts";
import { DmaDomain } from "../../../src/pci/dma-domain.ts";
import type { PciFunction } from "../../../src/pci/function.ts";
import { VfioAddressSpace, type VfioInterface } from "../../../src/pci/vfio/address-space.ts";
import { rejection } from "../rejection.ts";
import { lockedMemory } from "./bare-function.ts";
import { Machine } from "./inside.ts";
import { IommuView, type TranslatedRange } from "./iommu-view.ts";

/** A vf-token of nobody else's. */
export const TOKEN = "5a2c2f0e-13f0-4d0c-8e07-93f1f1a60c11";

/** Time that is no subject of a test. */
export function soon(what: string): Deadline {
  return Deadline.after(60_000, what);
}

/** The error that is to come. @throws what is none of the daemon's */
export async function refusal(refused: Promise<unknown>): Promise<VhostdError> {
  const error = await rejection(refused);
  if (!(error instanceof VhostdError)) throw error;
  return error;
}

/** Guest memory of a file, at an IOVA. Bytes. */
export function rangeOf(file: OwnedFd, iova: number, size: number, offset = 0): DmaRange {
  const { dev, ino } = fileInfo(file.number);
  return { iova, size, offset, file: { dev, ino } };
}

/** Address spaces of kernel VFIO in the machine, without a daemon; and what the IOMMU makes of them. */
export class SpaceLab {
  readonly machine = Machine.here();
  private readonly bus = new Bus(["/sys/bus/pci/devices"]);
  private readonly bound = new DisposableStack();
  /** Open fds when nothing is open. */
  private readonly idleFds: number;
  private domains: DmaDomain[] = [];
  private functions: { readonly domain: DmaDomain; readonly fn: PciFunction }[] = [];
  private files: OwnedFd[] = [];

  private constructor(private readonly view: IommuView) {
    // The first two are alone in their groups.
    for (const id of ["blk0", "blk1"]) this.bound.use(this.machine.function(id).bind());
    this.idleFds = liveFds();
  }

  static async create(): Promise<SpaceLab> {
    return new SpaceLab(await IommuView.of(Machine.here()));
  }

  /** Ends what a test has left open. @throws VhostdError timedOut where not all fds and pages are given back */
  async reset(): Promise<void> {
    for (const { domain, fn } of this.functions) {
      await domain.detach(fn);
      await fn[Symbol.asyncDispose]();
    }
    for (const domain of this.domains) domain.abandon();
    for (const file of this.files) file[Symbol.dispose]();
    [this.domains, this.functions, this.files] = [[], [], []];
    await soon("closing what address spaces held").poll(() => liveFds() === this.idleFds || undefined, 10);
    await soon("unlocking memory").poll(() => lockedMemory(process.pid) === 0 || undefined, 10);
  }

  space(wanted: VfioInterface, owner = "a VM", token = TOKEN): { space: VfioAddressSpace; domain: DmaDomain } {
    const space = new VfioAddressSpace(owner, { interface: wanted, token: async () => token, log: silentLogger });
    const domain = new DmaDomain(space);
    this.domains.push(domain);
    return { space, domain };
  }

  domain(wanted: VfioInterface, owner?: string): DmaDomain {
    return this.space(wanted, owner).domain;
  }

  address(id: string): string {
    return this.machine.function(id).address;
  }

  /** @param where QEMU's name of a function, or a PCI address */
  async open(domain: DmaDomain, where: string): Promise<PciFunction> {
    const fn = await domain.open(await this.entry(where), soon(`opening ${where}`));
    this.functions.push({ domain, fn });
    return fn;
  }

  async attach(domain: DmaDomain, where: string): Promise<PciFunction> {
    const fn = await this.open(domain, where);
    await domain.attach(fn);
    return fn;
  }

  async close(domain: DmaDomain, fn: PciFunction): Promise<void> {
    this.functions = this.functions.filter((one) => one.fn !== fn);
    await domain.detach(fn);
    await fn[Symbol.asyncDispose]();
  }

  async entry(where: string): Promise<BusEntry> {
    const address = where.includes(":") ? where : this.address(where);
    return (await this.bus.find(parsePciAddress(address)))!;
  }

  /** A file that is open until the test is over. */
  file(size: number): OwnedFd {
    return this.keep(memfd("guest-memory", size));
  }

  keep(file: OwnedFd): OwnedFd {
    this.files.push(file);
    return file;
  }

  /** @returns takes the memory away again */
  async claim(domain: DmaDomain, iova: number, size: number): Promise<() => Promise<void>> {
    const file = this.file(size);
    const range = rangeOf(file, iova, size);
    await domain.claim("test", range, file.number);
    return () => domain.release("test", range);
  }

  /** What the IOMMU translates for a function. */
  async reachable(id: string): Promise<readonly TranslatedRange[]> {
    const translation = await this.view.translation(this.address(id));
    if (translation.kind === "everything") throw new Error(`${id} reaches everything`);
    return translation.kind === "nothing" ? [] : translation.ranges;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.reset();
    this.bound.dispose();
  }
}
