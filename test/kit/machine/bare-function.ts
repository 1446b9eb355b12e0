import { readFileSync } from "node:fs";
import { OwnedFd } from "../../../src/native/fd.ts";
import { slowClose } from "../../../src/native/slow.ts";
import { openFile } from "../../../src/native/sys.ts";
import {
  request,
  VFIO_GROUP_GET_DEVICE_FD,
  VFIO_GROUP_SET_CONTAINER,
  VFIO_SET_IOMMU,
  VFIO_TYPE1V2_IOMMU,
} from "../../../src/pci/vfio/iommu-uapi.ts";
import { PciAddress } from "./pci-function.ts";

/** A function that somebody other than the daemon has open: group, container and device, and nothing else. */
export class BareFunction implements AsyncDisposable {
  private constructor(
    private readonly device: OwnedFd,
    private readonly others: DisposableStack,
  ) {}

  /**
   * @param address PCI address of a function that is alone in its group
   * @param token vf-token, a UUID, given as the kernel wants it: behind the name
   * @throws SystemError, EACCES and EINVAL where the token is not right
   */
  static async open(address: string, token?: string): Promise<BareFunction> {
    using undo = new DisposableStack();
    const container = undo.use(openFile("/dev/vfio/vfio", "read-write"));
    const group = undo.use(openFile(`/dev/vfio/${new PciAddress(address).group}`, "read-write"));
    await request(group.number, VFIO_GROUP_SET_CONTAINER, new Uint8Array(Int32Array.of(container.number).buffer));
    await request(container.number, VFIO_SET_IOMMU, VFIO_TYPE1V2_IOMMU);
    const name = token === undefined ? address : `${address} vf_token=${token}`;
    const device = await request(group.number, VFIO_GROUP_GET_DEVICE_FD, Buffer.from(`${name}\0`));
    return new BareFunction(new OwnedFd(device), undo.move());
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await slowClose(this.device);
    this.others.dispose();
  }
}

/** Memory that a process keeps from being swapped, bytes: for type 1 "VmLck", for iommufd "VmPin". */
export function lockedMemory(pid: number): number {
  const status = readFileSync(`/proc/${pid}/status`, "utf8");
  const kilobytes = ["VmLck", "VmPin"].map((name) =>
    Number(new RegExp(`^${name}:\\s+(\\d+) kB`, "m").exec(status)?.[1]),
  );
  return kilobytes.reduce((sum, value) => sum + value, 0) * 1024;
}
