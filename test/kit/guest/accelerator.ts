import { mkdir, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Guest } from "./guest.ts";
import type { GuestImage } from "./image.ts";

export type Accelerator = "kvm" | "tcg";

const CACHE = join(import.meta.dir, "../../../.cache/guest");
/** Milliseconds. A working KVM boots the guest in one or two seconds; a machine whose KVM is slower gains nothing by it. */
const PROBE_TIMEOUT = 6_000;

/**
 * KVM where a guest really boots with it, else QEMU's own emulation. That /dev/kvm can be opened, and even that it runs
 * a few instructions, says little: inside some VMs it then hangs. The answer holds until this machine is booted again.
 */
export async function findAccelerator(image: GuestImage): Promise<Accelerator> {
  const boot = (await readFile("/proc/sys/kernel/random/boot_id", "utf8")).trim();
  const path = join(CACHE, "accelerator");
  const [known, answer] = (await Bun.file(path).exists()) ? (await readFile(path, "utf8")).trim().split(" ") : [];
  if (known === boot && (answer === "kvm" || answer === "tcg")) return answer;
  const found = (await kvmBoots(image)) ? "kvm" : "tcg";
  await mkdir(CACHE, { recursive: true });
  await writeFile(path, `${boot} ${found}\n`);
  return found;
}

async function kvmBoots(image: GuestImage): Promise<boolean> {
  if (
    !(await Bun.file("/dev/kvm")
      .stat()
      .catch(() => undefined))
  )
    return false;
  const directory = await mkdtemp(join(tmpdir(), "vhostd-kvm-"));
  try {
    await using guest = await Guest.start({ directory, name: "probe", accelerator: "kvm", image, disks: [] });
    await guest.booted(1, PROBE_TIMEOUT);
    return true;
  } catch {
    return false;
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
}
