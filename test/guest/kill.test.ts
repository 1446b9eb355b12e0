import { expect, test } from "bun:test";
import { imageChecksum } from "../kit/guest/disk-checks.ts";
import type { Guest } from "../kit/guest/guest.ts";
import { Lab } from "../kit/guest/lab.ts";
import { Load } from "../kit/guest/load.ts";

const ROUNDS = 20;
/** These rounds are a Linux guest, the others the program of the boot sector, which is at work much sooner. */
const LINUX_ROUNDS = [2, 6, 9, 13, 16, 19];
const MIB = 2 ** 20;

/** Firmware killed after some verified rounds. @returns the counters on the disks, which went up by the rounds reported */
async function killFirmware(lab: Lab, before: readonly number[]): Promise<number[]> {
  const machine = await lab.startFirmwareVm();
  await machine.reached(20);
  await machine.vm.kill();
  const counters = await lab.counters();
  const rounds = await machine.rounds();
  for (const [disk, counter] of counters.entries()) {
    const reported = before[disk]! + rounds;
    // The last write may have been done without having been reported.
    expect([reported, reported + 1]).toContain(counter);
  }
  return counters;
}

/** Writes 1 MiB behind `place`, synchronously. @returns the checksum */
async function writeRaw(guest: Guest, device: string, place: number): Promise<string> {
  const sum = await guest.run(`dd if=/dev/urandom of=/tmp/raw bs=64k count=16 2> /dev/null
    dd if=/tmp/raw of=/dev/${device} bs=64k seek=${place * 16} oflag=direct 2> /dev/null; sha256sum < /tmp/raw`);
  return sum.slice(0, 64);
}

async function readRaw(guest: Guest, device: string, place: number): Promise<string> {
  const sum = await guest.run(
    `dd if=/dev/${device} bs=64k skip=${place * 16} count=16 iflag=direct 2> /dev/null | sha256sum`,
  );
  return sum.slice(0, 64);
}

test("QEMU is killed in the middle of I/O twenty times, and the next one on the same sockets works", async () => {
  await using lab = await Lab.ready({ queues: 4 });
  await lab.writeBootSector();
  const written = lab.disks.map((disk) => ({ ...disk, sums: new Map<number, string>() }));
  let counters = lab.disks.map(() => 0);
  for (let round = 0; round < ROUNDS; round++) {
    if (!LINUX_ROUNDS.includes(round)) {
      counters = await killFirmware(lab, counters);
      continue;
    }
    const guest = await lab.bootGuest({ processors: 2 });
    for (const { device, sums } of written) {
      for (const [place, sum] of sums) expect(await readRaw(guest, device, place)).toBe(sum);
      const place = 16 + sums.size;
      sums.set(place, await writeRaw(guest, device, place));
    }
    await Load.start(guest, lab.devices, 64, 2);
    await guest.vm.kill();
  }
  for (const { image, sums } of written) {
    expect(sums.size).toBe(LINUX_ROUNDS.length);
    for (const [place, sum] of sums) expect(await imageChecksum(image, place * MIB, MIB)).toBe(sum);
  }
}, 240_000);
