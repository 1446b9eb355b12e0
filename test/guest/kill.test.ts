import { expect, test } from "bun:test";
import { imageChecksum } from "../kit/guest/disk-checks.ts";
import type { Guest } from "../kit/guest/guest.ts";
import { Lab } from "../kit/guest/lab.ts";
import { Load } from "../kit/guest/load.ts";

const ROUNDS = 20;
/** These rounds are a Linux guest, the others the program of the boot sector, which is at work much sooner. */
const LINUX_ROUNDS = [2, 6, 9, 13, 16, 19];
const MIB = 2 ** 20;

/** Firmware killed after some verified rounds. @returns the counter on the disk, which went up by the rounds reported */
async function killFirmware(lab: Lab, before: number): Promise<number> {
  const machine = await lab.startFirmwareVm();
  await machine.reached(20);
  await machine.vm.kill();
  const counter = await machine.counter();
  const reported = before + (await machine.rounds());
  // The last write may have been done without having been reported.
  expect([reported, reported + 1]).toContain(counter);
  return counter;
}

/** Writes 1 MiB behind `place`, synchronously. @returns the checksum */
async function writeRaw(guest: Guest, place: number): Promise<string> {
  const sum = await guest.run(`dd if=/dev/urandom of=/tmp/raw bs=64k count=16 2> /dev/null
    dd if=/tmp/raw of=/dev/vda bs=64k seek=${place * 16} oflag=direct 2> /dev/null; sha256sum < /tmp/raw`);
  return sum.slice(0, 64);
}

async function readRaw(guest: Guest, place: number): Promise<string> {
  const sum = await guest.run(
    `dd if=/dev/vda bs=64k skip=${place * 16} count=16 iflag=direct 2> /dev/null | sha256sum`,
  );
  return sum.slice(0, 64);
}

test("QEMU is killed in the middle of I/O twenty times, and the next one on the same socket works", async () => {
  await using lab = await Lab.ready({ queues: 4 });
  await lab.writeBootSector();
  const written = new Map<number, string>();
  let counter = 0;
  for (let round = 0; round < ROUNDS; round++) {
    if (!LINUX_ROUNDS.includes(round)) {
      counter = await killFirmware(lab, counter);
      continue;
    }
    const guest = await lab.bootGuest({ processors: 2 });
    for (const [place, sum] of written) expect(await readRaw(guest, place)).toBe(sum);
    const place = 16 + written.size;
    written.set(place, await writeRaw(guest, place));
    await Load.start(guest, 64, 2);
    await guest.vm.kill();
  }
  for (const [place, sum] of written) expect(await imageChecksum(lab.disk, place * MIB, MIB)).toBe(sum);
}, 240_000);
