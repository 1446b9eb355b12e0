import { asError, VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { PciAddress } from "../pci/address.ts";
import type { DeviceClass, SoftDevice, SoftDeviceClass, SoftOptionValues } from "../plugin.ts";
import { VIRTIO_DEVICE_BASE, VIRTIO_VENDOR } from "../virtio/registers.ts";
import { AdminService } from "./admin-service.ts";
import type { BusDirectory } from "./bus-directory.ts";
import { optionsOfVf } from "./class-options.ts";
import { FunctionServer } from "./function-server.ts";
import { ManagedVf } from "./managed-vf.ts";
import type { PciIdentity } from "./pci-config-space.ts";
import { adminQueueIndex, PF_RING_SIZE, pfDevice } from "./pf-device.ts";
import { PfSettings } from "./pf-options.ts";
import type { RequestSource } from "./request-service.ts";
import { SoftFunction } from "./soft-function.ts";
import { vfAddress } from "./topology.ts";
import { VfTracker } from "./vf-tracker.ts";

/** What is asked for: one PF with its VFs. */
export interface PfOptions {
  readonly address: PciAddress;
  readonly deviceClass: DeviceClass & { readonly softDevice: SoftDeviceClass };
  readonly vfs: number;
  /** Options of the VFs, by name; defaults are not filled in. */
  readonly options: SoftOptionValues;
  /** Options of the PF itself, by name. */
  readonly pfOptions?: SoftOptionValues;
}

/** How long admin commands took, from the ring and back to it. Microseconds, since the PF was made. */
export interface CommandTimes {
  /** That were answered. */
  readonly commands: number;
  /** Each for itself. */
  readonly microseconds: number;
  /** In which at least one was under way: less than the above where several were at once. */
  readonly busyMicroseconds: number;
}

/** One function and who serves it. */
export interface ServedFunction {
  readonly address: PciAddress;
  readonly fn: SoftFunction;
  readonly server: FunctionServer;
  /** The PF of a VF. */
  readonly pf: PciAddress | undefined;
  readonly deviceClass: PfOptions["deviceClass"];
  /** Of a PF with an admin virtqueue: how long its commands took. */
  readonly commandTimes?: () => CommandTimes;
}

/** What QEMU's modern devices have; any id from 0x40 on says "modern" (VIRTIO 1.2, 4.1.2.1). */
const SUBSYSTEM_DEVICE = 0x1100;
const REVISION = 1;

/** A PF and its VFs, each on a socket of its own. */
export class PhysicalFunction {
  private constructor(readonly functions: readonly ServedFunction[]) {}

  /**
   * Makes, publishes and serves them all, or nothing.
   * @throws VhostdError with the function and what does not fit
   */
  static async serve(options: PfOptions, bus: BusDirectory, log: Logger): Promise<PhysicalFunction> {
    const { address, deviceClass } = options;
    const functions: ServedFunction[] = [];
    try {
      const vfs = Array.from({ length: options.vfs }, (_, index) => vfAddress(address, index));
      const publish = async (at: PciAddress, fn: SoftFunction, place: Pick<ServedFunction, "pf" | "commandTimes">) => {
        try {
          await bus.publish(at, fn.identity);
          const server = new FunctionServer(bus.socketPath(at), fn, log.child(at));
          functions.push({ address: at, fn, server, deviceClass, ...place });
        } catch (error) {
          fn[Symbol.dispose]();
          throw error;
        }
      };
      const managed: ManagedVf[] = [];
      const settings = new PfSettings(options.pfOptions);
      const { pf, commandTimes } = makePf(options, settings, managed, log.child(address));
      await publish(address, pf, { pf: undefined, ...(commandTimes === undefined ? {} : { commandTimes }) });
      for (const [index, vf] of vfs.entries()) {
        const values = optionsOfVf(deviceClass.softDevice, options.options, { pf: address, vf: index });
        const fn = makeVf(vf, deviceClass, values, log.child(vf));
        await publish(vf, fn, { pf: address });
        const tracker = new VfTracker(fn.dirtyLog, pf.dirtyLog);
        managed.push(new ManagedVf(fn.virtio, () => settings.freeze, tracker));
      }
      await bus.linkFunctions(address, vfs);
      return new PhysicalFunction(functions);
    } catch (error) {
      await closeAll(functions);
      throw error;
    }
  }

  /** Hangs up on all clients and closes the sockets; the directories stay. */
  async close(): Promise<void> {
    await closeAll(this.functions);
  }
}

async function closeAll(functions: readonly ServedFunction[]): Promise<void> {
  await Promise.all(
    functions.map(async ({ server, fn }) => {
      await server.close();
      fn[Symbol.dispose]();
    }),
  );
}

/** @throws VhostdError badArguments with the reason of the class, or of the worker that it names */
function makeVf(
  address: PciAddress,
  deviceClass: PfOptions["deviceClass"],
  values: SoftOptionValues,
  log: Logger,
): SoftFunction {
  try {
    return makeFunction(address, deviceClass, deviceClass.softDevice.create(values), values, log);
  } catch (error) {
    throw new VhostdError("badArguments", `${address}: ${asError(error).message}`, { cause: error });
  }
}

/** @param vfs by number; those that are made later are added */
function makePf(
  { address, deviceClass }: PfOptions,
  settings: PfSettings,
  vfs: readonly ManagedVf[],
  log: Logger,
): { readonly pf: SoftFunction; readonly commandTimes: (() => CommandTimes) | undefined } {
  const queue = settings.migration === "vendor" ? adminQueueIndex(deviceClass) : undefined;
  const admin = new AdminService(queue, () => vfs, settings, log);
  const device = pfDevice(queue, settings, () => admin.forget());
  const options = { ringSize: PF_RING_SIZE };
  const pf = makeFunction(address, deviceClass, device, options, log, (rings) => admin.serve(rings));
  return { pf, commandTimes: queue === undefined ? undefined : () => commandTimesOf(pf) };
}

function commandTimesOf(pf: SoftFunction): CommandTimes {
  const { requests: commands = 0, microseconds = 0, busyMicroseconds = 0 } = pf.info();
  return { commands, microseconds, busyMicroseconds };
}

function makeFunction(
  address: PciAddress,
  { virtioId, softDevice }: PfOptions["deviceClass"],
  device: SoftDevice,
  { ringSize, vectors }: SoftOptionValues,
  log: Logger,
  onRequests?: (rings: RequestSource) => void,
): SoftFunction {
  const identity: PciIdentity = {
    vendor: VIRTIO_VENDOR,
    device: VIRTIO_DEVICE_BASE + virtioId,
    subsystemVendor: VIRTIO_VENDOR,
    subsystemDevice: SUBSYSTEM_DEVICE,
    revision: REVISION,
    class: softDevice.pciClass,
  };
  const options = {
    address,
    identity,
    ringSize: Number(ringSize),
    ...(vectors === undefined ? {} : { vectors: Number(vectors) }),
    ...(onRequests === undefined ? {} : { onRequests }),
  };
  return new SoftFunction(options, device, log);
}
