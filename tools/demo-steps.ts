import { mkdir, truncate, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { findAccelerator } from "../test/kit/guest/accelerator.ts";
import { imageChecksum } from "../test/kit/guest/disk-checks.ts";
import { Guest } from "../test/kit/guest/guest.ts";
import { buildGuestImage } from "../test/kit/guest/image.ts";
import { Stack } from "../test/kit/guest/stack.ts";

const MIB = 2 ** 20;
const DISK_SIZE = 256;
/** MiB that the guest writes and reads for the table. */
const TRANSFER = 64;
const QUEUES = 2;
/** The guest's card, and that of the guest at the other end of the wire. */
const NICS = [
  { mac: "52:54:00:00:00:01", address: "10.0.0.1" },
  { mac: "52:54:00:00:00:02", address: "10.0.0.2" },
] as const;
const PINGS = 20;

const started = performance.now();

function say(text: string): void {
  console.log(`${((performance.now() - started) / 1000).toFixed(1).padStart(6)} s  ${text}`);
}

/**
 * The whole way of a guest's block: QEMU, the daemon, the software VF, a disk image, and back; and that of a frame to
 * another guest.
 * @param home an empty folder for all its files
 * @param resources takes its processes; disposing of it ends the demo wherever it is
 * @returns the exit code
 */
export async function runDemo(home: string, resources: AsyncDisposableStack): Promise<number> {
  const image = await buildGuestImage();
  const accelerator = await findAccelerator(image);
  const disk = join(home, "disk.img");
  const socket = join(home, "vhost-blk0");
  await writeFile(disk, "");
  await truncate(disk, DISK_SIZE * MIB);

  say(`a disk image of ${DISK_SIZE} MiB, and vfe-softvf: a software PF that manages one virtio-blk VF`);
  const stack = resources.use(await Stack.start({ directory: home, disk, queues: QUEUES }));
  say("vfe-vhostd");
  await stack.startDaemon();
  say(`vfe-vhost-cli mgmtpf -a ${stack.pf}`);
  await stack.command("mgmtpf", "-a", stack.pf);
  say(`vfe-vhost-cli mgmtpf -l: ${await listedPf(stack)}`);
  say(`vfe-vhost-cli vf -a ${stack.vf} -v ${socket}`);
  await stack.command("vf", "-a", stack.vf, "-v", socket);

  say("a second PF, of class net: its two VFs are the ends of one wire; and a daemon for it");
  const sockets = await startLan(join(home, "lan"), resources);

  say(
    `QEMU (${accelerator}) with a disk and a card, and another one with a card; the daemons connect to their sockets`,
  );
  const start = performance.now();
  const nic = (index: 0 | 1) => ({ socket: sockets[index], pairs: 1, mac: NICS[index].mac });
  const common = { directory: home, accelerator, image };
  const disks = [{ socket, queues: QUEUES }];
  const guest = resources.use(await Guest.start({ ...common, name: "guest", processors: 2, disks, nics: [nic(0)] }));
  const other = resources.use(await Guest.start({ ...common, name: "other", nics: [nic(1)] }));
  await guest.booted(1);
  const bootTime = (performance.now() - start) / 1000;
  say(
    `Linux ${await guest.run("uname -r")} is up and sees /dev/vda, ${await guest.run("cat /sys/block/vda/size")} sectors`,
  );

  say("the guest makes an ext4 file system, writes a file, unmounts, mounts again and reads it");
  const fileSums = await guest.run(`mkfs.ext4 -q -F /dev/vda ${DISK_SIZE / 2}M && mount /dev/vda /mnt
    dd if=/dev/urandom of=/mnt/file bs=1M count=16 2> /dev/null; sha256sum < /mnt/file
    umount /mnt && mount /dev/vda /mnt && sha256sum < /mnt/file && umount /mnt`);
  const [before, after] = fileSums.split("\n");

  say(`the guest writes ${TRANSFER} MiB behind it and reads them back, past its cache`);
  const first = DISK_SIZE / 2;
  await guest.run("dd if=/dev/urandom of=/tmp/data bs=1M count=16 2> /dev/null");
  const repeat = `for i in $(seq ${first / 16} ${(first + TRANSFER) / 16 - 1})`;
  const writeTime = await timed(
    guest,
    `${repeat}; do dd if=/tmp/data of=/dev/vda bs=1M seek=$((i * 16)) oflag=direct 2> /dev/null; done`,
  );
  const readTime = await timed(
    guest,
    `dd if=/dev/vda of=/dev/null bs=1M skip=${first} count=${TRANSFER} iflag=direct 2> /dev/null`,
  );
  const guestSum = await guest.run(
    `dd if=/dev/vda bs=1M skip=${first} count=${TRANSFER} iflag=direct 2> /dev/null | sha256sum`,
  );
  const hostSum = await imageChecksum(disk, first * MIB, TRANSFER * MIB);
  say("the same blocks, read out of the disk image on the host");

  say(`the guests see each other: ${PINGS} pings, and ${TRANSFER} MiB by TCP`);
  await other.booted(1);
  const lan = await exchange(guest, other);

  const good =
    before !== undefined &&
    before === after &&
    guestSum.startsWith(hostSum) &&
    lan.loss === 0 &&
    lan.sent === lan.received;
  console.log(`
  accelerator        ${accelerator}
  guest up after     ${bootTime.toFixed(1)} s
  file checksum      ${before === after ? "same after remount" : "DIFFERENT after remount"}
  block checksum     ${hostSum.slice(0, 16)}… ${guestSum.startsWith(hostSum) ? "in guest and image" : `but the guest read ${guestSum.slice(0, 16)}…`}
  sequential write   ${(TRANSFER / writeTime).toFixed(0)} MiB/s
  sequential read    ${(TRANSFER / readTime).toFixed(0)} MiB/s
  pings lost         ${lan.loss} of ${PINGS}
  TCP checksum       ${lan.sent.slice(0, 16)}… ${lan.sent === lan.received ? "in both guests" : `but ${lan.received.slice(0, 16)}… arrived`}
  TCP transfer       ${(TRANSFER / lan.seconds).toFixed(0)} MiB/s
  whole demo         ${((performance.now() - started) / 1000).toFixed(1)} s
`);
  console.log(good ? "The guests' data went through the VFs and is right." : "The data is WRONG.");
  return good ? 0 : 1;
}

/** @returns the vhost-user sockets of two VFs, back to back */
async function startLan(directory: string, resources: AsyncDisposableStack): Promise<readonly [string, string]> {
  await mkdir(directory);
  const stack = resources.use(
    await Stack.start({ directory, deviceClass: "net", vfs: 2, queues: 1, softvf: ["--backend", "wire"] }),
  );
  await stack.startDaemon();
  await stack.command("mgmtpf", "-a", stack.pf);
  const sockets = [join(directory, "vhost-net0"), join(directory, "vhost-net1")] as const;
  for (const [index, socket] of sockets.entries()) {
    await stack.command("vf", "-a", stack.vfAddress(index), "-v", socket);
  }
  return sockets;
}

/** Lost pings, checksums of what one guest sent and the other received, and how long that took. */
async function exchange(guest: Guest, other: Guest) {
  for (const [index, machine] of [guest, other].entries()) {
    await machine.run(`ip link set eth0 up && ip address add ${NICS[index]!.address}/24 dev eth0`);
  }
  const { address } = NICS[0];
  const pings = await other.run(`ping -c ${PINGS} -i 0.05 -W 2 ${address} | grep received`);
  const answered = Number(/(\d+) packets received/.exec(pings)?.[1] ?? 0);
  const times = `for i in $(seq ${TRANSFER / 16})`;
  const sent = await guest.run(`httpd -p 80 -h /tmp; ${times}; do cat /tmp/data; done | sha256sum`);
  const begun = performance.now();
  const received = await other.run(`${times}; do wget -q -O - http://${address}/data; done | sha256sum`);
  return { loss: PINGS - answered, sent, received, seconds: (performance.now() - begun) / 1000 };
}

/** What the list of PFs says of the only one, on one line. */
async function listedPf(stack: Stack): Promise<string> {
  const { devices } = JSON.parse(await stack.command("mgmtpf", "-l"));
  return JSON.stringify(devices[0]);
}

/** Seconds that a script takes in the guest. */
async function timed(guest: Guest, script: string): Promise<number> {
  const start = performance.now();
  await guest.run(script);
  return (performance.now() - start) / 1000;
}
