import { Deadline } from "../base/deadline.ts";
import { VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { OwnedFd } from "../native/fd.ts";
import { type PciAddress, parsePciAddress } from "../pci/address.ts";
import type { BusEntry } from "../pci/bus.ts";
import type { PciFunction } from "../pci/function.ts";
import { openFunction, reviveFunction } from "../pci/open.ts";
import type { DeviceClass } from "../plugin.ts";
import type { PluginRegistry } from "../plugin-host.ts";
import { VirtioPciDevice } from "../virtio/pci-device.ts";
import { DEADLINES } from "./deadlines.ts";
import { closing, type PfRecord, RECORD_VERSION } from "./record.ts";

/** A physical function that the daemon holds open on behalf of its VFs. */
export class Pf implements AsyncDisposable {
  private closed = false;
  /** Why the function is gone, or null. */
  reason: string | null = null;

  private constructor(
    readonly address: PciAddress,
    readonly entry: BusEntry,
    readonly deviceClass: DeviceClass,
    private readonly fn: PciFunction,
    log: Logger,
  ) {
    void fn.lost.then((reason) => {
      if (this.closed) return;
      this.reason = reason.message;
      log.child(`pf ${address}`).error("gone (remove it and add it again)", reason);
    });
  }

  /** @throws VhostdError; nothing is left open then */
  static async attach(address: PciAddress, entry: BusEntry, plugins: PluginRegistry, log: Logger): Promise<Pf> {
    if (entry.physfn !== undefined) {
      throw new VhostdError("pfNotFound", `${address} is a virtual function of ${entry.physfn}`, {
        fix: `add ${entry.physfn} as the PF, then this one with "vf -a"`,
      });
    }
    const deadline = Deadline.after(DEADLINES.attach, `attaching ${address}`);
    await using undo = new AsyncDisposableStack();
    const fn = undo.use(await openFunction(entry, address, deadline));
    const device = await VirtioPciDevice.probe(fn, deadline);
    const deviceClass = plugins.deviceClassById(device.virtioId);
    if (deviceClass === undefined) {
      throw new VhostdError("pfDeviceId", `${address} has virtio device id ${device.virtioId}, which no plugin serves`);
    }
    undo.move();
    return new Pf(address, entry, deviceClass, fn, log);
  }

  /**
   * Goes on with a PF from its record and fds, without a word to it.
   * @throws VhostdError where they do not fit; all fds are closed then
   */
  static revive(
    entry: BusEntry,
    record: PfRecord,
    fds: Map<string, OwnedFd>,
    plugins: PluginRegistry,
    log: Logger,
  ): Pf {
    using unused = closing(fds);
    const address = parsePciAddress(record.address);
    const deviceClass = plugins.deviceClassById(record.virtioId);
    if (deviceClass === undefined) {
      throw new VhostdError("pfDeviceId", `no plugin serves virtio device id ${record.virtioId} any more`);
    }
    unused.move();
    return new Pf(address, entry, deviceClass, reviveFunction(entry, address, record.function, fds), log);
  }

  snapshot(): { record: PfRecord; fds: ReadonlyMap<string, number> } {
    const { data, fds } = this.fn.snapshot();
    const { address, deviceClass } = this;
    return { record: { version: RECORD_VERSION, address, virtioId: deviceClass.virtioId, function: data }, fds };
  }

  /** Closes the function. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.closed = true;
    await this.fn[Symbol.asyncDispose]();
  }

  /** Lets go of the function without a word to it. */
  abandon(): void {
    this.closed = true;
    this.fn.abandon();
  }
}
