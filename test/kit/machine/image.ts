import { createHash } from "node:crypto";
import { readdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { kernelPackage, makeOnce, unpackPackage } from "../debian.ts";
import { type ArchiveEntry, cpioArchive } from "../guest/cpio.ts";
import { addBusybox, addModuleOrder, addModules, fileEntry, findBusybox } from "../guest/initramfs-parts.ts";
import { unpackKernel } from "../guest/kernel.ts";
import { findOwnKernel } from "./own-kernel.ts";

/**
 * Kernels by what tests call them. "6.1": Debian 12's. "6.12": what Debian offers beside it. "iommufd": 6.12, small and
 * built by us, with iommufd and the VFIO character devices that no kernel of Debian 12 has.
 */
export const KERNELS = ["6.1", "6.12", "iommufd"] as const;
export type KernelName = (typeof KERNELS)[number];

/** What QEMU boots. */
export interface MachineImage {
  readonly kernel: string;
  readonly initramfs: string;
}

/** The packages without content whose kernel it is. */
const META_PACKAGES = { "6.1": "linux-image-amd64", "6.12": "linux-image-6.12-amd64" } as const;
/** Modules of Debian's kernels; all is built into our own. */
const MODULES = [
  ...["virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay"],
  ...["vfio_iommu_type1", "vfio_pci", "virtio_blk", "virtio_net", "tun", "veth", "af_packet"],
];
export const MACHINE_CACHE = join(import.meta.dir, "../../../.cache/machine");
const INIT = join(import.meta.dir, "initramfs/init");
const GUEST = join(import.meta.dir, "../guest");
const SOURCES = [
  ...[INIT, join(import.meta.dir, "image.ts")],
  ...["initramfs-parts.ts", "kernel.ts", "modules.ts", "cpio.ts"].map((name) => join(GUEST, name)),
];

/**
 * Makes what QEMU boots, from Debian packages that are unpacked and never installed: 70 to 110 MB to download.
 * @throws Error when a package cannot be had, or our own kernel was not built (buildOwnKernel)
 */
export async function buildMachineImage(kernel: KernelName): Promise<MachineImage> {
  const folder = await imageFolder(kernel);
  await makeOnce(folder, (work) => (kernel === "iommufd" ? makeOwn(work) : makeDebian(kernel, work)));
  return imageIn(folder);
}

async function makeDebian(kernel: keyof typeof META_PACKAGES, work: string): Promise<void> {
  const name = await kernelPackage(META_PACKAGES[kernel]);
  const unpacked = await unpackPackage(name, join(work, "../kernel"), MACHINE_CACHE);
  const release = (await readdir(join(unpacked, "lib/modules")))[0];
  if (!release) throw new Error(`${name} has no kernel modules`);
  const entries = new Map<string, ArchiveEntry>();
  await addModules(entries, join(unpacked, "lib/modules", release), MODULES);
  const vmlinuz = await readFile(join(unpacked, "boot", `vmlinuz-${release}`));
  await write(imageIn(work), entries, await unpackKernel(vmlinuz));
}

async function makeOwn(work: string): Promise<void> {
  const kernel = await findOwnKernel();
  if (kernel === undefined)
    throw new Error("the kernel with iommufd was not built: ./dev test vfio --iommufd builds it");
  const entries = new Map<string, ArchiveEntry>();
  addModuleOrder(entries, []);
  await write(imageIn(work), entries, await readFile(kernel));
}

async function write(image: MachineImage, entries: Map<string, ArchiveEntry>, kernel: Uint8Array): Promise<void> {
  const busybox = await unpackPackage("busybox-static", join(image.kernel, "../../busybox"), MACHINE_CACHE);
  await addBusybox(entries, findBusybox(busybox));
  entries.set("init", await fileEntry(INIT, true));
  for (const directory of ["proc", "sys", "dev"]) entries.set(directory, { kind: "directory" });
  await writeFile(image.initramfs, cpioArchive(entries));
  await writeFile(image.kernel, kernel);
}

function imageIn(folder: string): MachineImage {
  return { kernel: join(folder, "vmlinux"), initramfs: join(folder, "initramfs") };
}

/** A changed init or module list makes another image; a newer kernel in the archive does not. */
async function imageFolder(kernel: KernelName): Promise<string> {
  const hash = createHash("sha256");
  for (const path of SOURCES) hash.update(await readFile(path));
  if (kernel === "iommufd") hash.update((await findOwnKernel()) ?? "");
  return join(MACHINE_CACHE, `${kernel}-${hash.digest("hex").slice(0, 16)}`);
}
