import { mkdir, readdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { makeOnce, output } from "../debian.ts";
import { MACHINE_CACHE } from "./image.ts";

/** A QEMU and how it is started. */
export interface Qemu {
  readonly command: readonly string[];
  readonly environment: Readonly<Record<string, string>>;
  /** Property of a chardev that tries once a second to connect; its name is another since 9.2. */
  readonly reconnect: string;
}

/** The installed QEMU: 7.2 on Debian 12, which emulates no SR-IOV. */
export const SYSTEM_QEMU: Qemu = { command: ["qemu-system-x86_64"], environment: {}, reconnect: "reconnect=1" };

/** SR-IOV is emulated from 10.1 on; these suites of Debian have it. */
const SUITES = ["trixie", "trixie-backports"] as const;
const KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg";
const FOLDER = join(MACHINE_CACHE, `qemu-${SUITES[1]}`);

/**
 * Brings the QEMU that emulates SR-IOV, with every library that it needs: 38 MB to download, 172 MB unpacked. Apt works in
 * a state of its own, in which nothing is installed; this machine's stays as it is.
 * @throws Error when the packages cannot be had
 */
export async function bringNewerQemu(): Promise<Qemu> {
  await makeOnce(FOLDER, async (work) => {
    const state = join(work, "../apt");
    const environment = { APT_CONFIG: await privateApt(state) };
    await output(["apt-get", "update", "-q"], { environment });
    await output(["apt-get", "install", "-q", "-y", "--download-only", "-t", SUITES[1], "qemu-system-x86"], {
      environment,
    });
    const archives = join(state, "cache/archives");
    for (const name of await readdir(archives)) {
      if (name.endsWith(".deb")) await output(["dpkg-deb", "--extract", join(archives, name), work]);
    }
  });
  return qemuIn(FOLDER);
}

/** @returns the path of its configuration file */
async function privateApt(state: string): Promise<string> {
  for (const folder of ["lists/partial", "cache/archives/partial", "parts"]) {
    await mkdir(join(state, folder), { recursive: true });
  }
  const mirror = await debianMirror();
  const sources = SUITES.map((suite) => `deb [signed-by=${KEYRING}] ${mirror} ${suite} main\n`);
  await writeFile(join(state, "sources.list"), sources.join(""));
  await writeFile(join(state, "status"), "");
  const settings = {
    "Dir::Etc::sourcelist": join(state, "sources.list"),
    "Dir::Etc::sourceparts": join(state, "parts"),
    "Dir::Etc::preferences": join(state, "preferences"),
    "Dir::Etc::preferencesparts": join(state, "parts"),
    "Dir::State::lists": join(state, "lists"),
    "Dir::State::status": join(state, "status"),
    "Dir::Cache": join(state, "cache"),
    "APT::Install-Recommends": "false",
    "APT::Sandbox::User": "",
    "Acquire::Languages": "none",
    "Acquire::Retries": "3",
  };
  const path = join(state, "apt.conf");
  const lines = Object.entries(settings).map(([name, value]) => `${name} "${value}";\n`);
  await writeFile(path, lines.join(""));
  return path;
}

/** Where this machine gets Debian from. */
async function debianMirror(): Promise<string> {
  const known = await output(["apt-get", "indextargets", "--format", "$(ORIGIN) $(LABEL) $(REPO_URI)"]);
  return /^Debian Debian (\S+)$/m.exec(known)?.[1] ?? "http://deb.debian.org/debian";
}

/** Its own dynamic linker starts it, because this machine's C library is older. */
function qemuIn(folder: string): Qemu {
  const libraries = join(folder, "usr/lib/x86_64-linux-gnu");
  return {
    command: [
      ...[join(folder, "usr/lib64/ld-linux-x86-64.so.2"), "--library-path", libraries],
      ...[join(folder, "usr/bin/qemu-system-x86_64"), "-L", join(folder, "usr/share/qemu")],
      ...["-L", join(folder, "usr/share/seabios")],
    ],
    environment: { QEMU_MODULE_DIR: join(libraries, "qemu") },
    reconnect: "reconnect-ms=1000",
  };
}
