import { readdir, readFile } from "node:fs/promises";
import { basename, join } from "node:path";

/**
 * The kernel modules `wanted` and all that they depend on, in the order in which they can be loaded.
 * Read from each module's own `depends=` (section .modinfo): a package that was only unpacked has no modules.dep.
 * @returns content by name
 */
export async function moduleOrder(folder: string, wanted: readonly string[]): Promise<Map<string, Uint8Array>> {
  const paths = new Map<string, string>();
  for (const path of await readdir(join(folder, "kernel"), { recursive: true })) {
    if (path.endsWith(".ko")) paths.set(canonical(basename(path, ".ko")), join(folder, "kernel", path));
  }
  const loaded = new Map<string, Uint8Array>();
  const load = async (name: string): Promise<void> => {
    if (loaded.has(name)) return;
    const path = paths.get(name);
    if (!path) throw new Error(`the kernel in ${folder} has no module ${name}`);
    const content = await readFile(path);
    for (const dependency of dependencies(content)) await load(dependency);
    loaded.set(name, content);
  };
  for (const name of wanted) await load(canonical(name));
  return loaded;
}

function dependencies(module: Buffer): string[] {
  const marker = Buffer.from("\0depends=");
  const start = module.indexOf(marker);
  if (start < 0) return [];
  const list = module.toString("latin1", start + marker.length, module.indexOf(0, start + marker.length));
  return list === "" ? [] : list.split(",").map(canonical);
}

/** Modules are named with either character; the kernel takes both for the same. */
function canonical(name: string): string {
  return name.replaceAll("-", "_");
}
