import { readdir, readFile } from "node:fs/promises";
import { basename, join } from "node:path";
import { unpackXz } from "./kernel.ts";

/** How Debian names a module's file; since 6.12 they are packed. */
const MODULE_FILE = /\.ko(\.xz)?$/;

/**
 * The kernel modules `wanted` and all that they depend on, in the order in which they can be loaded; not those that the
 * kernel has built in. Read from each module's own `depends=` (section .modinfo): a package that was only unpacked has no
 * modules.dep.
 * @returns content by name
 */
export async function moduleOrder(folder: string, wanted: readonly string[]): Promise<Map<string, Uint8Array>> {
  const paths = new Map<string, string>();
  for (const path of await readdir(join(folder, "kernel"), { recursive: true })) {
    if (MODULE_FILE.test(path)) paths.set(moduleName(path), join(folder, "kernel", path));
  }
  const builtIn = new Set((await readFile(join(folder, "modules.builtin"), "utf8")).split("\n").map(moduleName));
  const loaded = new Map<string, Uint8Array>();
  const load = async (name: string): Promise<void> => {
    if (loaded.has(name) || builtIn.has(name)) return;
    const path = paths.get(name);
    if (!path) throw new Error(`the kernel in ${folder} has no module ${name}`);
    const content = path.endsWith(".xz") ? await unpackXz(await readFile(path)) : await readFile(path);
    for (const dependency of dependencies(content)) await load(dependency);
    loaded.set(name, content);
  };
  for (const name of wanted) await load(canonical(name));
  return loaded;
}

function dependencies(module: Uint8Array): string[] {
  const bytes = Buffer.from(module.buffer, module.byteOffset, module.byteLength);
  const marker = Buffer.from("\0depends=");
  const start = bytes.indexOf(marker);
  if (start < 0) return [];
  const list = bytes.toString("latin1", start + marker.length, bytes.indexOf(0, start + marker.length));
  return list === "" ? [] : list.split(",").map(canonical);
}

function moduleName(path: string): string {
  return canonical(basename(path).replace(MODULE_FILE, ""));
}

/** Modules are named with either character; the kernel takes both for the same. */
function canonical(name: string): string {
  return name.replaceAll("-", "_");
}
