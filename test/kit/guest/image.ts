import { createHash } from "node:crypto";
import { existsSync } from "node:fs";
import { copyFile, mkdir, mkdtemp, readdir, readFile, rename, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { type ArchiveEntry, cpioArchive } from "./cpio.ts";
import { unpackKernel } from "./kernel.ts";
import { moduleOrder } from "./modules.ts";

/** What QEMU boots: Debian's kernel, unpacked and never installed, and an initramfs around busybox. */
export interface GuestImage {
  readonly kernel: string;
  readonly initramfs: string;
  /** The guest's busybox, for its servers on this machine: the DHCP server is in no package of its own. */
  readonly busybox: string;
}

/** Modules that the guest loads, with all that they depend on. The checksum is what ext4 asks the crypto API for. */
const MODULES = ["virtio_pci", "virtio_console", "virtio_blk", "virtio_net", "virtio_rng", "crc32c_generic", "ext4"];
const CACHE = join(import.meta.dir, "../../../.cache/guest");
/** Scripts of ours, by the place that they have in the guest. */
const SCRIPTS = { init: "init", "bin/verify-load": "verify-load", "etc/udhcpc": "udhcpc" } as const;
const SOURCES = ["image.ts", "kernel.ts", "modules.ts", "cpio.ts"];

/** Where the image of these sources is, if it was built. */
export async function findGuestImage(): Promise<GuestImage | undefined> {
  const folder = join(CACHE, `image-${await sourcesKey()}`);
  return existsSync(folder) ? imageIn(folder) : undefined;
}

/**
 * Builds the image from Debian packages: about 75 MB to download, ten seconds.
 * @throws Error when a package cannot be had
 */
export async function buildGuestImage(): Promise<GuestImage> {
  const present = await findGuestImage();
  if (present) return present;
  await mkdir(CACHE, { recursive: true });
  const folder = join(CACHE, `image-${await sourcesKey()}`);
  const work = await mkdtemp(join(CACHE, "build-"));
  try {
    const [busybox, kernel] = await Promise.all([
      unpack("busybox-static", join(work, "busybox")),
      unpack(await kernelPackage(), join(work, "kernel")),
    ]);
    const made = join(work, "image");
    await mkdir(made);
    await makeImage(busybox, kernel, imageIn(made));
    // Two builds at once make the same; the later one is dropped with its folder.
    if (!existsSync(folder)) await rename(made, folder);
  } finally {
    await rm(work, { recursive: true, force: true });
  }
  return imageIn(folder);
}

async function makeImage(busybox: string, kernel: string, image: GuestImage): Promise<void> {
  const release = (await readdir(join(kernel, "lib/modules")))[0];
  if (!release) throw new Error(`${kernel} has no kernel modules`);
  const entries = new Map<string, ArchiveEntry>();
  const program = findBusybox(busybox);
  await addBusybox(entries, program);
  await copyFile(program, image.busybox);
  await addModules(entries, join(kernel, "lib/modules", release));
  await addProgram(entries, await which("mke2fs"), "sbin/mkfs.ext4");
  await addProgram(entries, await which("ethtool"), "sbin/ethtool");
  for (const [place, script] of Object.entries(SCRIPTS)) entries.set(place, await file(scriptPath(script), true));
  for (const directory of ["proc", "sys", "dev", "tmp", "mnt"]) entries.set(directory, { kind: "directory" });
  await writeFile(image.initramfs, cpioArchive(entries));
  await writeFile(image.kernel, await unpackKernel(await readFile(join(kernel, "boot", `vmlinuz-${release}`))));
}

function imageIn(folder: string): GuestImage {
  return {
    kernel: join(folder, "vmlinux"),
    initramfs: join(folder, "initramfs"),
    busybox: join(folder, "busybox"),
  };
}

/** A changed init or module list makes another image; a newer kernel in the archive does not. */
async function sourcesKey(): Promise<string> {
  const hash = createHash("sha256");
  const sources = SOURCES.map((source) => join(import.meta.dir, source));
  for (const path of [...sources, ...Object.values(SCRIPTS).map(scriptPath)]) hash.update(await readFile(path));
  return hash.digest("hex").slice(0, 16);
}

function scriptPath(name: string): string {
  return join(import.meta.dir, "initramfs", name);
}

async function kernelPackage(): Promise<string> {
  const depends = await output(["apt-cache", "depends", "--important", "linux-image-amd64"]);
  const name = /Depends: (linux-image-\S+)/.exec(depends)?.[1];
  if (!name) throw new Error("apt knows no linux-image-amd64: its lists are missing, run apt-get update");
  return name;
}

/** Downloads a package, unless it was before, and unpacks it into `folder` without installing it. @returns `folder` */
async function unpack(name: string, folder: string): Promise<string> {
  const uri = (await output(["apt-get", "download", "--print-uris", name])).trim();
  const archive = /^'[^']+' (\S+\.deb) /.exec(uri)?.[1];
  if (!archive) throw new Error(`apt cannot download ${name}: ${uri || "no address"}`);
  const path = join(CACHE, archive);
  if (!existsSync(path)) await download(name, path);
  await output(["dpkg-deb", "--extract", path, folder]);
  return folder;
}

/** A package appears under its name only when it is whole. */
async function download(name: string, path: string): Promise<void> {
  const work = await mkdtemp(join(CACHE, "download-"));
  try {
    await output(["apt-get", "download", "-q", "-o", "Acquire::Retries=3", name], work);
    const archive = (await readdir(work)).find((entry) => entry.endsWith(".deb"));
    if (!archive) throw new Error(`apt-get download ${name} left no package`);
    await rename(join(work, archive), path);
  } finally {
    await rm(work, { recursive: true, force: true });
  }
}

function findBusybox(root: string): string {
  const path = [join(root, "bin/busybox"), join(root, "usr/bin/busybox")].find(existsSync);
  if (!path) throw new Error(`${root} has no busybox`);
  return path;
}

async function addBusybox(entries: Map<string, ArchiveEntry>, path: string): Promise<void> {
  entries.set("bin/busybox", await file(path, true));
  for (const applet of (await output([path, "--list"])).trim().split("\n")) {
    if (applet !== "busybox") entries.set(`bin/${applet}`, { kind: "link", target: "busybox" });
  }
}

async function addModules(entries: Map<string, ArchiveEntry>, folder: string): Promise<void> {
  const modules = await moduleOrder(folder, MODULES);
  for (const [name, content] of modules) entries.set(`modules/${name}.ko`, { kind: "file", content });
  const order = [...modules.keys()].map((name) => `${name}\n`).join("");
  entries.set("modules/order", { kind: "file", content: new TextEncoder().encode(order) });
}

/** A program of this machine with the libraries that the dynamic linker would give it. */
async function addProgram(entries: Map<string, ArchiveEntry>, path: string, destination: string): Promise<void> {
  entries.set(destination, await file(path, true));
  const libraries = (await output(["ldd", path])).matchAll(/(\/\S+) \(0x/g);
  for (const [, library] of libraries) if (library) entries.set(library.slice(1), await file(library, true));
}

async function file(path: string, executable = false): Promise<ArchiveEntry> {
  return { kind: "file", content: await readFile(path), executable };
}

async function which(program: string): Promise<string> {
  const path = Bun.which(program, { PATH: `${process.env["PATH"]}:/usr/sbin:/sbin` });
  if (!path) throw new Error(`${program} is not on this machine`);
  return path;
}

async function output(command: string[], cwd?: string): Promise<string> {
  const child = Bun.spawn(command, { stdin: "ignore", stdout: "pipe", stderr: "pipe", ...(cwd ? { cwd } : {}) });
  const [text, errors, code] = await Promise.all([child.stdout.text(), child.stderr.text(), child.exited]);
  if (code !== 0) throw new Error(`${command.join(" ")} ended with ${code}: ${errors.trim()}`);
  return text;
}
