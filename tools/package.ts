import { copyFile, cp, mkdir, mkdtemp, rm, symlink, truncate, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Child } from "../test/kit/guest/child.ts";
import { defineTask, Failure, ROOT, runQuietly } from "./command.ts";
import { buildDebianPackage } from "./package/debian-package.ts";
import { prepare } from "./preparation.ts";

const DIST = join(ROOT, "dist");
/** bin/vfe.ts is the program by whose name it is called; the keeper, which is to need little memory, is by itself. */
const SHARED = "vfe-vhostd";
const LINKS = ["vfe-softvf", "vfe-vhost-cli"];
const KEEPER = "vfe-vhostd-ha";
const NATIVE_MODULE = join(ROOT, "native/build/vhostd.node");
const START_TIMEOUT = 15_000;

export default defineTask({
  name: "package",
  description:
    "Programs that need neither Bun nor node_modules, with their plugins, in dist/, and a Debian package of them",
  run: async () => {
    await prepare("native");
    const buildTime = new Date().toISOString();
    await installPrograms(DIST, buildTime);
    await tryOut(buildTime);
    console.log(`package: ${[SHARED, ...LINKS, KEEPER].join(", ")} and plugins/ are in ${DIST}`);
    if (Bun.which("dpkg-deb") === null) console.log("package: no Debian package is made: this machine has no dpkg-deb");
    else console.log(`package: ${await buildDebianPackage(DIST, DIST)}`);
    return 0;
  },
});

/** The form that users install: the programs with native module and plugins, in a directory that holds nothing else. */
export async function installPrograms(directory: string, buildTime: string): Promise<void> {
  const executables = [
    ["bin/vfe.ts", SHARED],
    ["bin/vhostd-ha.ts", KEEPER],
  ] as const;
  await compilePrograms(directory, executables, buildTime);
  for (const name of LINKS) await symlink(SHARED, join(directory, name));
}

/** Executables in that form, a file each. @param programs source, from the top of the checkout, and name of each */
export async function compilePrograms(
  directory: string,
  programs: readonly (readonly [string, string])[],
  buildTime: string,
): Promise<void> {
  await rm(directory, { recursive: true, force: true });
  await mkdir(directory, { recursive: true });
  for (const [program, name] of programs) await compile(program, join(directory, name), buildTime);
  await copyFile(NATIVE_MODULE, join(directory, "vhostd.node"));
  await cp(join(ROOT, "plugins"), join(directory, "plugins"), { recursive: true });
}

const SETTINGS = [
  // A root daemon must not take settings from files that lie where it is started.
  "--no-compile-autoload-dotenv",
  "--no-compile-autoload-bunfig",
  // Starting shall not mean parsing.
  "--bytecode",
  "--format=esm",
  // The heap is collected when it has grown by a few MiB, not by 32: these programs have little, and run for long.
  "--compile-exec-argv=--smol",
];

async function compile(program: string, executable: string, buildTime: string): Promise<void> {
  const define = ["--define", `VFE_BUILD_TIME=${JSON.stringify(buildTime)}`];
  await runQuietly([process.execPath, "build", "--compile", ...SETTINGS, ...define, program, "--outfile", executable]);
}

/** The executables, away from the checkout: native module, plugins, vfio-user and the control interface. */
async function tryOut(buildTime: string): Promise<void> {
  const home = await mkdtemp(join(tmpdir(), "vhostd-package-"));
  const start = async (name: string, ...options: string[]) => {
    const child = new Child([join(DIST, name), ...options], { name, log: join(home, `${name}.log`) });
    await child.line(/^ready /m, START_TIMEOUT).catch((error: Error) => {
      throw new Failure(`the executable ${name} does not start: ${error.message}`);
    });
    return child;
  };
  const cli = (...words: string[]) =>
    runQuietly([join(DIST, "vfe-vhost-cli"), ...words], { VFE_VHOSTD_RUNTIME_DIR: join(home, "vhostd") });
  try {
    await writeFile(join(home, "disk.img"), "");
    await truncate(join(home, "disk.img"), 2 ** 20);
    await mkdir(join(home, "vhostd"));
    const pf = "0000:5a:00.0";
    const disk = ["--class", "blk", "--disk", join(home, "disk.img")];
    await using _softvf = await start("vfe-softvf", "--pf", pf, ...disk, "--runtime-dir", join(home, "softvf"));
    const bus = join(home, "softvf/devices");
    await using _daemon = await start("vfe-vhostd", "--runtime-dir", join(home, "vhostd"), "--bus", bus);
    await cli("mgmtpf", "-a", pf);
    await cli("vf", "-a", "0000:5a:00.1", "-v", join(home, "vhost.sock"));
    const version = await cli("version");
    if (!version.includes(buildTime)) throw new Failure(`vfe-vhostd does not say when it was built:\n${version}`);
  } finally {
    await rm(home, { recursive: true, force: true });
  }
}
