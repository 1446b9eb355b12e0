import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { makeOnce, output } from "../debian.ts";

const CACHE = join(import.meta.dir, "../../../.cache/debian");
/** Beside what every Debian has: what services are started by, and its checks of units. */
const PACKAGES = ["systemd"];

/** The archive of a Debian in which nothing was ever done, if it was made. Of this machine's own release: what is compiled here runs there. */
export async function findDebian(): Promise<string | undefined> {
  const archive = join(await folder(), "root.tar");
  return existsSync(archive) ? archive : undefined;
}

/**
 * Makes it with mmdebstrap: about 45 MB to download, fifteen seconds. Only root can.
 * @throws Error when it cannot be had
 */
export async function makeDebian(): Promise<void> {
  const release = await codename();
  await makeOnce(await folder(), async (work) => {
    const options = ["--quiet", "--variant=minbase", `--include=${PACKAGES.join(",")}`];
    await output(["mmdebstrap", ...options, release, join(work, "root.tar")]);
  });
}

async function folder(): Promise<string> {
  return join(CACHE, [await codename(), ...PACKAGES].join("-"));
}

async function codename(): Promise<string> {
  const release = await readFile("/etc/os-release", "utf8").catch(() => "");
  const name = /^VERSION_CODENAME=(\S+)$/m.exec(release)?.[1];
  if (name === undefined) throw new Error("/etc/os-release names no release that has packages");
  return name;
}
