import { existsSync } from "node:fs";
import { Failure, runQuietly } from "./command.ts";

interface SystemProgram {
  /** The Debian package that has it. */
  readonly package: string;
  readonly why: string;
}

/** What the project needs of the system, by the program, or the path of the file, that is looked for. */
const PROGRAMS: Readonly<Record<string, SystemProgram>> = {
  "g++": { package: "g++", why: "compiles native/; its binutils assemble the boot sector of the guest tests" },
  make: { package: "make", why: "builds native/" },
  "qemu-system-x86_64": { package: "qemu-system-x86", why: "the VMM of ./dev demo and of the guest tests" },
  xz: { package: "xz-utils", why: "unpacks the guest's kernel, which boots in half the time then" },
  mke2fs: { package: "e2fsprogs", why: "makes the guest's file system; its tools check the disk image from outside" },
  ip: { package: "iproute2", why: "makes the network namespaces and TAP interfaces of the guest tests" },
  ethtool: { package: "ethtool", why: "is put into the guest, whose queues it changes" },
  "dpdk-testpmd": { package: "dpdk-dev", why: "drives network functions in tests: a front-end that is not QEMU's" },
  mmdebstrap: { package: "mmdebstrap", why: "makes the clean Debian in which tests install the package" },
  "/usr/lib/ipxe/qemu/pxe-virtio.rom": { package: "ipxe-qemu", why: "boots VMs of the tests from the network" },
};

/** Programs of the packages above that only administrators have on their PATH. */
const SEARCH_PATH = `${process.env["PATH"]}:/usr/sbin:/sbin`;
const PAUSES = [2, 5, 10];

/** Installs the Debian packages that are missing; nothing happens when none is. @throws Failure */
export async function installPackages(): Promise<void> {
  const missing = Object.entries(PROGRAMS).filter(([wanted]) => !isPresent(wanted));
  if (missing.length === 0) return;
  const names = missing.map(([, program]) => program.package);
  const install = ["apt-get", "install", "-y", "--no-install-recommends", ...names];
  const reasons = missing.map(([, program]) => `  ${program.package.padEnd(16)} ${program.why}`).join("\n");
  if (!hasApt()) throw new Failure(`these Debian packages, or what your system has for them:\n${reasons}`);
  if (process.getuid?.() !== 0) {
    throw new Failure(`missing packages:\n${reasons}\ninstall them with\n  sudo ${install.join(" ")}`);
  }
  console.error(`installing Debian packages:\n${reasons}`);
  await updatePackageLists();
  await withRetries(() =>
    runQuietly([...install, "-o", "DPkg::Lock::Timeout=120"], { DEBIAN_FRONTEND: "noninteractive" }),
  );
}

function isPresent(wanted: string): boolean {
  return wanted.startsWith("/") ? existsSync(wanted) : Bun.which(wanted, { PATH: SEARCH_PATH }) !== null;
}

function hasApt(): boolean {
  return Bun.which("apt-get", { PATH: process.env["PATH"] ?? "" }) !== null;
}

/** Refreshes apt's lists, where we may. A mirror that fails once is asked again. @throws Failure */
export async function updatePackageLists(): Promise<void> {
  if (!hasApt()) throw new Failure("Debian packages cannot be had: this machine has no apt-get");
  if (process.getuid?.() !== 0) return;
  await withRetries(() => runQuietly(["apt-get", "update", "-q", "-o", "DPkg::Lock::Timeout=120"]));
}

async function withRetries(action: () => Promise<unknown>): Promise<void> {
  for (const pause of PAUSES) {
    try {
      await action();
      return;
    } catch (error) {
      console.error(`failed, once more in ${pause} s: ${error instanceof Error ? error.message : error}`);
      await Bun.sleep(pause * 1000);
    }
  }
  await action();
}
