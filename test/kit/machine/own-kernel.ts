import { createHash } from "node:crypto";
import { existsSync } from "node:fs";
import { copyFile, mkdir, readdir, readFile } from "node:fs/promises";
import { homedir } from "node:os";
import { join } from "node:path";
import { makeOnce, output, unpackPackage } from "../debian.ts";

const SOURCE = "linux-source-6.12";
/** What the build needs and a machine seldom has; they run where they were unpacked. */
const TOOLS = ["flex", "bison", "m4", "libsigsegv2"];
/** Options beside those of `make tinyconfig`. */
const CONFIG = join(import.meta.dir, "kernel.config");

/** The kernel (an ELF file), if it was built. */
export async function findOwnKernel(): Promise<string | undefined> {
  const path = join(await folder(), "vmlinux");
  return existsSync(path) ? path : undefined;
}

/**
 * Builds the kernel that has iommufd: 150 MB to download, seven minutes on two processors, and it needs gcc, make, bc and
 * perl. It is kept outside the checkout, because a clean one is no reason to build it again.
 * @param log takes what the build says
 * @throws Error where a package or a program is missing, or the build fails
 */
export async function buildOwnKernel(log: (text: string) => void): Promise<string> {
  const cache = join(await folder(), "..");
  const made = await makeOnce(await folder(), async (work) => {
    log("getting the kernel's source");
    const tools = join(work, "../tools");
    for (const name of TOOLS) await unpackPackage(name, tools, join(cache, "packages"));
    const source = await unpackPackage(SOURCE, join(work, "../source"), join(cache, "packages"));
    const tree = join(work, "../tree");
    await mkdir(tree);
    await output(["tar", "-C", tree, "--strip-components=1", "-xf", join(source, `usr/src/${SOURCE}.tar.xz`)]);
    log("building the kernel; seven minutes on two processors");
    await compile(tree, tools);
    await copyFile(join(tree, "vmlinux"), join(work, "vmlinux"));
  });
  return join(made, "vmlinux");
}

async function compile(tree: string, tools: string): Promise<void> {
  const libraries = (await readdir(join(tools, "usr/lib"))).filter((name) => name.endsWith("-linux-gnu"));
  const environment = {
    PATH: `${join(tools, "usr/bin")}:${process.env["PATH"]}`,
    M4: join(tools, "usr/bin/m4"),
    BISON_PKGDATADIR: join(tools, "usr/share/bison"),
    LD_LIBRARY_PATH: libraries.map((name) => join(tools, "usr/lib", name)).join(":"),
  };
  const steps = [
    ["make", "tinyconfig"],
    ["scripts/kconfig/merge_config.sh", "-m", ".config", CONFIG],
    ["make", "olddefconfig"],
    ["nice", "make", `-j${navigator.hardwareConcurrency}`, "vmlinux"],
  ];
  for (const step of steps) await output(step, { cwd: tree, environment });
}

/** Another list of options makes another kernel; a newer source in the archive does not. */
async function folder(): Promise<string> {
  const base = process.env["XDG_CACHE_HOME"] || join(homedir(), ".cache");
  const key = createHash("sha256")
    .update(SOURCE)
    .update(await readFile(CONFIG))
    .digest("hex")
    .slice(0, 16);
  return join(base, "vhostd", `kernel-${key}`);
}
