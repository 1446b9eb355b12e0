import { existsSync } from "node:fs";
import { mkdir, mkdtemp, readdir, rename, rm } from "node:fs/promises";
import { join } from "node:path";

/** Runs a program. @returns its standard output @throws Error with what it wrote when it fails */
export async function output(
  command: readonly string[],
  options: { readonly cwd?: string; readonly environment?: Readonly<Record<string, string>> } = {},
): Promise<string> {
  const child = Bun.spawn([...command], {
    stdio: ["ignore", "pipe", "pipe"],
    ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
    env: { ...process.env, ...options.environment },
  });
  const [text, errors, code] = await Promise.all([child.stdout.text(), child.stderr.text(), child.exited]);
  if (code !== 0) throw new Error(`${command.join(" ")} ended with ${code}: ${errors.trim().slice(-2000)}`);
  return text;
}

/** The kernel that a package without content, such as linux-image-amd64, stands for. @throws Error where apt knows none */
export async function kernelPackage(meta: string): Promise<string> {
  const depends = await output(["apt-cache", "depends", "--important", meta]);
  const name = /Depends: (linux-image-\S+)/.exec(depends)?.[1];
  if (!name) throw new Error(`apt knows no ${meta}: its lists are missing, run apt-get update`);
  return name;
}

/**
 * Downloads a package, unless it was before, and unpacks it into `folder` without installing it.
 * @param cache keeps the packages
 * @returns `folder`
 * @throws Error when it cannot be had
 */
export async function unpackPackage(name: string, folder: string, cache: string): Promise<string> {
  const uri = (await output(["apt-get", "download", "--print-uris", name])).trim();
  const archive = /^'[^']+' (\S+\.deb) /.exec(uri)?.[1];
  if (!archive) throw new Error(`apt cannot download ${name}: ${uri || "no address"}`);
  const path = join(cache, archive);
  if (!existsSync(path)) await download(name, path, cache);
  await output(["dpkg-deb", "--extract", path, folder]);
  return folder;
}

/** A package appears under its name only when it is whole. */
async function download(name: string, path: string, cache: string): Promise<void> {
  await mkdir(cache, { recursive: true });
  const work = await mkdtemp(join(cache, "download-"));
  try {
    await output(["apt-get", "download", "-q", "-o", "Acquire::Retries=3", name], { cwd: work });
    const archive = (await readdir(work)).find((entry) => entry.endsWith(".deb"));
    if (!archive) throw new Error(`apt-get download ${name} left no package`);
    await rename(join(work, archive), path);
  } finally {
    await rm(work, { recursive: true, force: true });
  }
}

/**
 * Makes `folder` once: `make` fills a new folder, which then gets the name. Two that make the same at once do no harm;
 * the later one's is dropped.
 */
export async function makeOnce(folder: string, make: (work: string) => Promise<void>): Promise<string> {
  if (existsSync(folder)) return folder;
  const parent = join(folder, "..");
  await mkdir(parent, { recursive: true });
  const work = await mkdtemp(join(parent, "build-"));
  try {
    const made = join(work, "made");
    await mkdir(made);
    await make(made);
    if (!existsSync(folder)) await rename(made, folder);
  } finally {
    await rm(work, { recursive: true, force: true });
  }
  return folder;
}
