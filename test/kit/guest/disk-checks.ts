import { createHash } from "node:crypto";
import type { Guest } from "./guest.ts";

/** Checksum of a file by its path in the file system. */
export type Checksums = ReadonlyMap<string, string>;

/** Files of the kit's test file system, from one block to some megabytes. */
const FILES = 8;

/** Mounts a disk on the folder of its name in /mnt. */
export async function mount(guest: Guest, device: string): Promise<void> {
  await guest.run(`mkdir -p /mnt/${device} && mount /dev/${device} /mnt/${device}`);
}

/**
 * Makes an ext4 file system with files of random content on a disk of the guest, mounts, unmounts and mounts it again.
 * @param size KiB, or the whole disk
 */
export async function makeFileSystem(guest: Guest, device: string, size?: number): Promise<Checksums> {
  await guest.run(`mkfs.ext4 -q -F /dev/${device} ${size ?? ""}`);
  await mount(guest, device);
  const write = `dd if=/dev/urandom of=file$i bs=$((4096 + i * 1021)) count=$((1 + i * i * 16)) 2> /dev/null`;
  await guest.run(
    `set -e; cd /mnt/${device}; for i in $(seq 0 ${FILES - 1}); do ${write}; done; sha256sum file* > sums`,
  );
  const written = parseSums(await guest.run(`cat /mnt/${device}/sums && umount /mnt/${device}`));
  await mount(guest, device);
  return written;
}

/** The checksums of the files as the guest reads them now. */
export async function checksumsInGuest(guest: Guest, device: string): Promise<Checksums> {
  return parseSums(await guest.run(`cd /mnt/${device} && sha256sum file*`));
}

/** The checksums of the same files, read out of the disk image by this machine. */
export async function checksumsInImage(image: string, files: Iterable<string>): Promise<Checksums> {
  const sums = new Map<string, string>();
  for (const file of files) {
    const content = await Bun.$`PATH=$PATH:/usr/sbin debugfs -R ${`cat /${file}`} ${image}`.quiet();
    sums.set(file, createHash("sha256").update(content.stdout).digest("hex"));
  }
  return sums;
}

/** What e2fsck finds wrong in an unmounted file system in an image; empty when it is clean. */
export async function fileSystemErrors(image: string): Promise<string> {
  const check = await Bun.$`PATH=$PATH:/usr/sbin e2fsck -fn ${image}`.quiet().nothrow();
  return check.exitCode === 0 ? "" : `${check.stdout}${check.stderr}`;
}

/** Checksum of a range of a disk image, in bytes. */
export async function imageChecksum(image: string, offset: number, length: number): Promise<string> {
  const content = await Bun.file(image)
    .slice(offset, offset + length)
    .arrayBuffer();
  return createHash("sha256").update(new Uint8Array(content)).digest("hex");
}

function parseSums(text: string): Map<string, string> {
  const sums = new Map<string, string>();
  for (const line of text.trim().split("\n")) {
    const [sum = "", file = ""] = line.split(/\s+/);
    sums.set(file, sum);
  }
  return sums;
}
