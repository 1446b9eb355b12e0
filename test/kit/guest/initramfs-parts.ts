import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { output } from "../debian.ts";
import type { ArchiveEntry } from "./cpio.ts";
import { moduleOrder } from "./modules.ts";

/** The busybox in an unpacked package. @throws Error where there is none */
export function findBusybox(root: string): string {
  const path = [join(root, "bin/busybox"), join(root, "usr/bin/busybox")].find(existsSync);
  if (!path) throw new Error(`${root} has no busybox`);
  return path;
}

/** Busybox with a link for each of its commands. */
export async function addBusybox(entries: Map<string, ArchiveEntry>, path: string): Promise<void> {
  entries.set("bin/busybox", await fileEntry(path, true));
  for (const applet of (await output([path, "--list"])).trim().split("\n")) {
    if (applet !== "busybox") entries.set(`bin/${applet}`, { kind: "link", target: "busybox" });
  }
}

/**
 * The modules `wanted` of the kernel in `folder`, and /modules/order, which lists them as they can be loaded.
 * @throws Error where the kernel has one of them neither as a module nor built in
 */
export async function addModules(
  entries: Map<string, ArchiveEntry>,
  folder: string,
  wanted: readonly string[],
): Promise<void> {
  const modules = await moduleOrder(folder, wanted);
  for (const [name, content] of modules) entries.set(`modules/${name}.ko`, { kind: "file", content });
  addModuleOrder(entries, [...modules.keys()]);
}

/** As `addModules`, for modules that are there already, or for a kernel that needs none. */
export function addModuleOrder(entries: Map<string, ArchiveEntry>, names: readonly string[]): void {
  const order = names.map((name) => `${name}\n`).join("");
  entries.set("modules/order", { kind: "file", content: new TextEncoder().encode(order) });
}

/** A program of this machine with the libraries that the dynamic linker would give it. */
export async function addProgram(entries: Map<string, ArchiveEntry>, path: string, destination: string): Promise<void> {
  entries.set(destination, await fileEntry(path, true));
  const libraries = (await output(["ldd", path])).matchAll(/(\/\S+) \(0x/g);
  for (const [, library] of libraries) if (library) entries.set(library.slice(1), await fileEntry(library, true));
}

export async function fileEntry(path: string, executable = false): Promise<ArchiveEntry> {
  return { kind: "file", content: await readFile(path), executable };
}

/** Where a program is, also one that only administrators have on their PATH. @throws Error */
export async function which(program: string): Promise<string> {
  const path = Bun.which(program, { PATH: `${process.env["PATH"]}:/usr/sbin:/sbin` });
  if (!path) throw new Error(`${program} is not on this machine`);
  return path;
}
