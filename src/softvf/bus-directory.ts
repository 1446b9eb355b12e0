import { mkdir, rm, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { VhostdError } from "../base/errors.ts";
import type { PciAddress } from "../pci/address.ts";
import type { PciIdentity } from "./pci-config-space.ts";

/** A unix socket's path has room for this many bytes (sockaddr_un). */
const SOCKET_PATH_MAX = 107;
const SOCKET_NAME = "vfio-user.sock";

/** Functions by address, laid out like /sys/bus/pci/devices. */
export class BusDirectory {
  private readonly published = new Set<PciAddress>();

  constructor(readonly path: string) {}

  /** An empty directory: what an earlier process left behind is removed. */
  async prepare(): Promise<void> {
    await rm(this.path, { recursive: true, force: true });
    await mkdir(this.path, { recursive: true, mode: 0o755 });
  }

  /** @throws VhostdError socketPath where the path is too long for a unix socket */
  socketPath(address: PciAddress): string {
    const path = join(this.path, address, SOCKET_NAME);
    const length = new TextEncoder().encode(path).length;
    if (length > SOCKET_PATH_MAX) {
      throw new VhostdError("socketPath", `socket path ${path} has ${length} bytes, at most ${SOCKET_PATH_MAX}`, {
        fix: "choose a shorter --runtime-dir",
      });
    }
    return path;
  }

  /** Writes the attributes of a function; links to other functions come with `linkFunctions`. */
  async publish(address: PciAddress, identity: PciIdentity): Promise<void> {
    const directory = join(this.path, address);
    if (this.published.has(address)) {
      throw new VhostdError("exists", `two functions have the address ${address}`, {
        fix: "move a PF: its VFs have the addresses behind its own",
      });
    }
    this.published.add(address);
    await mkdir(directory, { mode: 0o755 });
    const attributes = {
      vendor: hex(identity.vendor, 4),
      device: hex(identity.device, 4),
      class: hex(identity.class, 6),
      subsystem_vendor: hex(identity.subsystemVendor, 4),
      subsystem_device: hex(identity.subsystemDevice, 4),
      revision: hex(identity.revision, 2),
      numa_node: "-1",
    };
    for (const [name, value] of Object.entries(attributes)) await writeAttribute(directory, name, value);
  }

  /** `physfn` of the VFs; `virtfnN`, `sriov_numvfs` and `sriov_totalvfs` of the PF. */
  async linkFunctions(pf: PciAddress, vfs: readonly PciAddress[]): Promise<void> {
    const directory = join(this.path, pf);
    await writeAttribute(directory, "sriov_numvfs", String(vfs.length));
    await writeAttribute(directory, "sriov_totalvfs", String(vfs.length));
    for (const [index, vf] of vfs.entries()) {
      await symlink(`../${vf}`, join(directory, `virtfn${index}`));
      await symlink(`../${pf}`, join(this.path, vf, "physfn"));
    }
  }

  /** Takes everything away, sockets included. */
  async remove(): Promise<void> {
    this.published.clear();
    await rm(this.path, { recursive: true, force: true });
  }
}

function writeAttribute(directory: string, name: string, value: string): Promise<void> {
  return writeFile(join(directory, name), `${value}\n`, { mode: 0o644 });
}

function hex(value: number, digits: number): string {
  return `0x${value.toString(16).padStart(digits, "0")}`;
}
