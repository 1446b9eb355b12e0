import { createHash } from "node:crypto";
import { existsSync } from "node:fs";
import { copyFile, readdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { kernelPackage, makeOnce, unpackPackage } from "../debian.ts";
import { findOwnKernel } from "../machine/own-kernel.ts";
import { type ArchiveEntry, cpioArchive } from "./cpio.ts";
import {
  addBusybox,
  addModuleOrder,
  addModules,
  addProgram,
  fileEntry,
  findBusybox,
  which,
} from "./initramfs-parts.ts";
import { unpackKernel } from "./kernel.ts";

/** What QEMU boots: a kernel that is not installed, and an initramfs around busybox. */
export interface GuestImage {
  readonly kernel: string;
  readonly initramfs: string;
  /** The guest's busybox, for its servers on this machine: the DHCP server is in no package of its own. */
  readonly busybox: string;
}

/**
 * "debian": the kernel of linux-image-amd64. "small": our own (test/kit/machine/own-kernel.ts), for a guest in a VM, which
 * boots with it in less than half of the time; it is not on every machine.
 */
export type GuestKernel = "debian" | "small";

/** Modules that the guest loads, with all that they depend on. The checksum is what ext4 asks the crypto API for. */
const MODULES = ["virtio_pci", "virtio_console", "virtio_blk", "virtio_net", "virtio_rng", "crc32c_generic", "ext4"];
const CACHE = join(import.meta.dir, "../../../.cache/guest");
/** Scripts of ours, by the place that they have in the guest. */
const SCRIPTS = { init: "init", "bin/verify-load": "verify-load", "etc/udhcpc": "udhcpc" } as const;
const SOURCES = ["image.ts", "initramfs-parts.ts", "kernel.ts", "modules.ts", "cpio.ts"];

/** Where the image of these sources is, if it was built. */
export async function findGuestImage(kernel: GuestKernel = "debian"): Promise<GuestImage | undefined> {
  const folder = await imageFolder(kernel);
  return existsSync(folder) ? imageIn(folder) : undefined;
}

/**
 * Builds the image from Debian packages: about 75 MB to download, ten seconds.
 * @throws Error when a package cannot be had, or our own kernel was not built
 */
export async function buildGuestImage(kernel: GuestKernel = "debian"): Promise<GuestImage> {
  const folder = await imageFolder(kernel);
  await makeOnce(folder, (work) => makeImage(kernel, work));
  return imageIn(folder);
}

/** The kernel that boots soonest of those that this machine has. */
export async function quickestGuestKernel(): Promise<GuestKernel> {
  return (await findOwnKernel()) === undefined ? "debian" : "small";
}

async function makeImage(kind: GuestKernel, work: string): Promise<void> {
  const image = imageIn(work);
  const entries = new Map<string, ArchiveEntry>();
  const program = findBusybox(await unpackPackage("busybox-static", join(work, "../busybox"), CACHE));
  await addBusybox(entries, program);
  await copyFile(program, image.busybox);
  await addProgram(entries, await which("mke2fs"), "sbin/mkfs.ext4");
  await addProgram(entries, await which("ethtool"), "sbin/ethtool");
  for (const [place, script] of Object.entries(SCRIPTS)) entries.set(place, await fileEntry(scriptPath(script), true));
  for (const directory of ["proc", "sys", "dev", "tmp", "mnt"]) entries.set(directory, { kind: "directory" });
  await (kind === "small"
    ? copySmallKernel(entries, image)
    : unpackDebianKernel(entries, image, join(work, "../kernel")));
  await writeFile(image.initramfs, cpioArchive(entries));
}

async function unpackDebianKernel(
  entries: Map<string, ArchiveEntry>,
  image: GuestImage,
  folder: string,
): Promise<void> {
  const kernel = await unpackPackage(await kernelPackage("linux-image-amd64"), folder, CACHE);
  const release = (await readdir(join(kernel, "lib/modules")))[0];
  if (!release) throw new Error(`${kernel} has no kernel modules`);
  await addModules(entries, join(kernel, "lib/modules", release), MODULES);
  await writeFile(image.kernel, await unpackKernel(await readFile(join(kernel, "boot", `vmlinuz-${release}`))));
}

/** All that a guest needs is built into it. */
async function copySmallKernel(entries: Map<string, ArchiveEntry>, image: GuestImage): Promise<void> {
  const kernel = await findOwnKernel();
  if (kernel === undefined) throw new Error("the small kernel was not built: ./dev test vfio --iommufd builds it");
  addModuleOrder(entries, []);
  await copyFile(kernel, image.kernel);
}

function imageIn(folder: string): GuestImage {
  return {
    kernel: join(folder, "vmlinux"),
    initramfs: join(folder, "initramfs"),
    busybox: join(folder, "busybox"),
  };
}

/** A changed init or module list makes another image; a newer kernel in the archive does not. */
async function imageFolder(kernel: GuestKernel): Promise<string> {
  const hash = createHash("sha256");
  const sources = SOURCES.map((source) => join(import.meta.dir, source));
  for (const path of [...sources, ...Object.values(SCRIPTS).map(scriptPath)]) hash.update(await readFile(path));
  if (kernel === "small") hash.update((await findOwnKernel()) ?? "");
  return join(CACHE, `${kernel === "small" ? "small" : "image"}-${hash.digest("hex").slice(0, 16)}`);
}

function scriptPath(name: string): string {
  return join(import.meta.dir, "initramfs", name);
}
