import { chmod, copyFile, cp, mkdir, mkdtemp, readdir, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join, relative } from "node:path";
import { gzipSync } from "node:zlib";
import { VERSION } from "../../src/version.ts";
import { ROOT, runQuietly } from "../command.ts";
import { manualPage } from "./manual-page.ts";

export const DEBIAN_PACKAGE = "vfe-vhostd";
const MAINTAINER = "vhostd maintainers <maintainers@vhostd.example>";
const HERE = import.meta.dir;

/** Where the programs are, beside them native module and plugins. */
const LIBRARY = `usr/lib/${DEBIAN_PACKAGE}`;
const DOCUMENTS = `usr/share/doc/${DEBIAN_PACKAGE}`;

/** What is on the PATH, with the section of its manual page. */
const COMMANDS = [
  { name: "vfe-vhostd", directory: "usr/sbin", section: 8 },
  { name: "vfe-vhostd-ha", directory: "usr/sbin", section: 8 },
  { name: "vfe-vhost-cli", directory: "usr/bin", section: 1 },
  { name: "vfe-softvf", directory: "usr/bin", section: 1 },
] as const;

const DESCRIPTION = `vhost acceleration daemon: virtio functions for vhost-user VMMs
 vfe-vhostd answers the vhost-user front-end of a VMM with a virtio PCI virtual
 function: the guest's rings are programmed into the function, and no byte of
 its data passes through the daemon. vfe-vhostd-ha keeps what the next daemon
 needs to go on, so that a restart or an upgrade is noticed by nobody.
 .
 With vfe-softvf, a software PF with virtio-blk and virtio-net VFs, all of it
 can be used without hardware.`;

/**
 * Makes the Debian package with `dpkg-deb`.
 * @param programs directory of the programs with native module and plugins
 * @param into directory of the package
 * @returns its path
 * @throws Failure
 */
export async function buildDebianPackage(programs: string, into: string): Promise<string> {
  const tree = await mkdtemp(join(tmpdir(), "vhostd-debian-"));
  try {
    await addPrograms(tree, programs);
    await addManualPages(tree, programs);
    await addDocuments(tree);
    await cp(join(HERE, "units"), join(tree, "usr/lib/systemd/system"), { recursive: true });
    await cp(join(HERE, "etc"), join(tree, "etc"), { recursive: true });
    await mkdir(join(tree, "usr/share/lintian/overrides"), { recursive: true });
    await copyFile(join(HERE, "debian/lintian-overrides"), join(tree, "usr/share/lintian/overrides", DEBIAN_PACKAGE));
    await addControl(tree);
    // Whatever umask and checkout have made of them.
    await runQuietly(["chmod", "-R", "u=rwX,go=rX", tree]);
    const path = join(into, `${DEBIAN_PACKAGE}_${debianVersion()}_amd64.deb`);
    // xz would make it a seventh smaller, and take many times as long.
    await runQuietly(["dpkg-deb", "--root-owner-group", "-Zzstd", "-z3", "--build", tree, path]);
    return path;
  } finally {
    await rm(tree, { recursive: true, force: true });
  }
}

/** Of two versions Debian takes 1.0-rc for the later one, but 1.0~rc for the earlier. */
function debianVersion(): string {
  return VERSION.replaceAll("-", "~");
}

async function addPrograms(tree: string, programs: string): Promise<void> {
  const library = join(tree, LIBRARY);
  await cp(programs, library, { recursive: true, verbatimSymlinks: true });
  await runQuietly(["strip", "--strip-unneeded", join(library, "vhostd.node")]);
  await chmod(join(library, "vhostd.node"), 0o644);
  for (const { name, directory } of COMMANDS) {
    await mkdir(join(tree, directory), { recursive: true });
    await symlink(join("../lib", DEBIAN_PACKAGE, name), join(tree, directory, name));
  }
}

async function addManualPages(tree: string, programs: string): Promise<void> {
  for (const { name, section } of COMMANDS) {
    const page = await manualPage(join(programs, name), name, section, VERSION);
    await addCompressed(join(tree, `usr/share/man/man${section}`, `${name}.${section}.gz`), page);
  }
}

async function addDocuments(tree: string): Promise<void> {
  const documents = join(tree, DOCUMENTS);
  await mkdir(documents, { recursive: true });
  for (const name of ["README.md", "CHANGELOG.md"]) await copyFile(join(ROOT, name), join(documents, name));
  await cp(join(ROOT, "docs"), join(documents, "docs"), { recursive: true });
  await copyFile(join(HERE, "debian/copyright"), join(documents, "copyright"));
  const release = `${DEBIAN_PACKAGE} (${debianVersion()}) unstable; urgency=medium`;
  const date = new Date().toUTCString().replace("GMT", "+0000");
  await addCompressed(
    join(documents, "changelog.gz"),
    `${release}\n\n  * What has changed is in CHANGELOG.md.\n\n -- ${MAINTAINER}  ${date}\n`,
  );
}

async function addCompressed(path: string, text: string): Promise<void> {
  await mkdir(dirname(path), { recursive: true });
  await writeFile(path, gzipSync(text, { level: 9 }));
}

async function addControl(tree: string): Promise<void> {
  const control = join(tree, "DEBIAN");
  const kibibytes = (await runQuietly(["du", "-s", "--apparent-size", tree])).split("\t")[0];
  await mkdir(control);
  const fields = {
    Package: DEBIAN_PACKAGE,
    Version: debianVersion(),
    Architecture: "amd64",
    Maintainer: MAINTAINER,
    "Installed-Size": kibibytes,
    Depends: await neededPackages(tree),
    Recommends: "kmod, systemd",
    Suggests: "qemu-system-x86",
    Section: "admin",
    Priority: "optional",
    Description: DESCRIPTION,
  };
  const lines = Object.entries(fields).map(([field, value]) => `${field}: ${value}\n`);
  await writeFile(join(control, "control"), lines.join(""));
  const settings = await readdir(join(tree, "etc"), { recursive: true, withFileTypes: true });
  const files = settings.filter((entry) => entry.isFile()).map(({ parentPath, name }) => join(parentPath, name));
  await writeFile(join(control, "conffiles"), files.map((path) => `/${relative(tree, path)}\n`).join(""));
  for (const script of ["postinst", "prerm", "postrm"]) {
    await copyFile(join(HERE, "debian", script), join(control, script));
    await chmod(join(control, script), 0o755);
  }
}

/** The packages of the libraries that are linked, in the versions whose symbols are used. */
async function neededPackages(tree: string): Promise<string> {
  const library = join(tree, LIBRARY);
  const files = [...COMMANDS.map(({ name }) => name), "vhostd.node"].map((name) => join(library, name));
  const symbols = await Promise.all(files.map((file) => runQuietly(["objdump", "--dynamic-syms", file])));
  const glibc = symbols.flatMap((text) => [...text.matchAll(/\bGLIBC_2\.(\d+)/g)].map(([, minor]) => Number(minor)));
  // The compiler's own library has all that it links.
  const compiler = (await runQuietly(["g++", "-dumpversion"])).trim();
  return `libc6 (>= 2.${Math.max(...glibc)}), libgcc-s1, libstdc++6 (>= ${compiler})`;
}
