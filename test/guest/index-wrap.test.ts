import { expect, test } from "bun:test";
import type { Guest } from "../kit/guest/guest.ts";
import { Lab } from "../kit/guest/lab.ts";
import { Load } from "../kit/guest/load.ts";

/** A ring index is 16 bits. */
const INDEX_COUNT = 2 ** 16;

/** Requests of a disk that the guest's driver has seen completed (Documentation/ABI/stable/sysfs-block, "stat"). */
async function completed(guest: Guest, device: string): Promise<number> {
  const counts = (await guest.run(`cat /sys/block/${device}/stat`)).trim().split(/\s+/).map(Number);
  return counts[0]! + counts[4]!;
}

/** Has the guest read a disk in so many small requests that a ring index runs over. */
async function readMuch(guest: Guest, device: string): Promise<void> {
  const read = `dd if=/dev/${device} of=/dev/null bs=1M iflag=direct`;
  await guest.run(`echo 4 > /sys/block/${device}/queue/max_sectors_kb
    for pass in 1 2 3; do ${read}; done > /dev/null 2>&1 &`);
}

test("stop and cont while ring indices run over 65535", async () => {
  await using lab = await Lab.ready();
  const guest = await lab.bootGuest({ processors: 2 });
  const load = await Load.start(guest, lab.devices, 64, 1);
  for (const device of lab.devices) await readMuch(guest, device);
  const done = async () => Math.min(...(await Promise.all(lab.devices.map((device) => completed(guest, device)))));
  const stopAndContinue = async () => {
    await guest.vm.qmp.execute("stop");
    await guest.vm.qmp.execute("cont");
    await load.progress();
  };
  while ((await done()) <= INDEX_COUNT) await stopAndContinue();
  await stopAndContinue();
  expect(await load.stop()).toBeGreaterThan(0);
}, 180_000);
