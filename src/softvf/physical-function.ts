import { asError, VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { PciAddress } from "../pci/address.ts";
import type { DeviceClass, SoftDevice, SoftDeviceClass, SoftOptionValues } from "../plugin.ts";
import { VIRTIO_DEVICE_BASE, VIRTIO_VENDOR } from "../virtio/registers.ts";
import type { BusDirectory } from "./bus-directory.ts";
import { optionsOfVf } from "./class-options.ts";
import { FunctionServer } from "./function-server.ts";
import type { PciIdentity } from "./pci-config-space.ts";
import { SoftFunction } from "./soft-function.ts";
import { vfAddress } from "./topology.ts";

/** What is asked for: one PF with its VFs. */
export interface PfOptions {
  readonly address: PciAddress;
  readonly deviceClass: DeviceClass & { readonly softDevice: SoftDeviceClass };
  readonly vfs: number;
  /** Options of the VFs, by name; defaults are not filled in. */
  readonly options: SoftOptionValues;
}

/** One function and who serves it. */
export interface ServedFunction {
  readonly address: PciAddress;
  readonly fn: SoftFunction;
  readonly server: FunctionServer;
  /** The PF of a VF. */
  readonly pf: PciAddress | undefined;
  readonly deviceClass: PfOptions["deviceClass"];
}

/** What QEMU's modern devices have; any id from 0x40 on says "modern" (VIRTIO 1.2, 4.1.2.1). */
const SUBSYSTEM_DEVICE = 0x1100;
const REVISION = 1;
const PF_RING_SIZE = 64;

/** A PF holds its VFs together; it has no queues. */
const PF_DEVICE: Omit<SoftDevice, typeof Symbol.dispose> = {
  features: 0n,
  queues: 0,
  worker: { name: "none", parameters: {} },
  config: () => new Uint8Array(0),
  writeConfig: () => ({}),
  set: (option) => {
    throw new Error(`a PF has no option ${option}`);
  },
};

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
      const make = async (at: PciAddress, pf: PciAddress | undefined, device: SoftDevice, values: SoftOptionValues) => {
        const own = log.child(at);
        const fn = makeFunction(at, deviceClass, device, values, own);
        try {
          await bus.publish(at, fn.identity);
          functions.push({ address: at, fn, server: new FunctionServer(bus.socketPath(at), fn, own), pf, deviceClass });
        } catch (error) {
          fn[Symbol.dispose]();
          throw error;
        }
      };
      await make(address, undefined, { ...PF_DEVICE, [Symbol.dispose]() {} }, { ringSize: PF_RING_SIZE });
      for (const [index, vf] of vfs.entries()) {
        const values = optionsOfVf(deviceClass.softDevice, options.options, index);
        await make(vf, address, createDevice(vf, deviceClass, values), values);
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

function createDevice(address: PciAddress, { softDevice }: PfOptions["deviceClass"], values: SoftOptionValues) {
  try {
    return softDevice.create(values);
  } catch (error) {
    throw new VhostdError("badArguments", `${address}: ${asError(error).message}`, { cause: error });
  }
}

function makeFunction(
  address: PciAddress,
  { virtioId, softDevice }: PfOptions["deviceClass"],
  device: SoftDevice,
  values: SoftOptionValues,
  log: Logger,
): SoftFunction {
  const identity: PciIdentity = {
    vendor: VIRTIO_VENDOR,
    device: VIRTIO_DEVICE_BASE + virtioId,
    subsystemVendor: VIRTIO_VENDOR,
    subsystemDevice: SUBSYSTEM_DEVICE,
    revision: REVISION,
    class: softDevice.pciClass,
  };
  const { ringSize, vectors } = values;
  return new SoftFunction(
    { address, identity, ringSize: Number(ringSize), ...(vectors === undefined ? {} : { vectors: Number(vectors) }) },
    device,
    log,
  );
}
