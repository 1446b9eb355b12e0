import { expect, test } from "bun:test";
import { checksumsInGuest, checksumsInImage, makeFileSystem } from "../kit/guest/disk-checks.ts";
import type { Guest } from "../kit/guest/guest.ts";
import { Lab } from "../kit/guest/lab.ts";
import { Load } from "../kit/guest/load.ts";

/** MiB; the kernel's unit of memory that comes and goes on x86-64. */
const MODULE = 128;

/** Takes the blocks of a new memory module into use, for movable pages only, which the page cache prefers. */
async function online(guest: Guest, blocks: number): Promise<void> {
  await guest.run(`n=0; until [ $n -ge ${blocks} ]; do
      for state in /sys/devices/system/memory/memory*/state; do
        [ "$(cat $state)" = offline ] && echo online_movable > $state && n=$((n + 1))
      done; usleep 20000
    done`);
}

/** Pages of files in the zone that consists of hot-plugged memory alone. */
async function cachedPages(guest: Guest): Promise<number> {
  const text = await guest.run(
    "awk '/^Node/ { movable = ($4 == \"Movable\") } movable && /nr_zone_(in)?active_file/ { n += $2 } END { print n + 0 }' /proc/zoneinfo",
  );
  return Number(text);
}

for (const queues of [1, 4]) {
  test(`memory plugged in under load is used for I/O, ${queues} queues`, async () => {
    await using lab = await Lab.ready({ queues });
    const guest = await lab.bootGuest({ processors: Math.min(queues, 2), hotplugMemory: 2 * MODULE });
    const load = await Load.start(guest, lab.devices, 96, 2);
    for (const module of ["first", "second"]) {
      await guest.vm.plugMemory(module, MODULE);
      await online(guest, 1);
      await load.progress();
    }
    expect(await load.stop()).toBeGreaterThan(0);

    // The page cache now stands in hot-plugged memory, so the device reads and writes there.
    for (const { device, image } of lab.disks) {
      const before = await cachedPages(guest);
      const written = await makeFileSystem(guest, device, 96 * 1024);
      expect(await checksumsInGuest(guest, device)).toEqual(written);
      expect((await cachedPages(guest)) - before).toBeGreaterThan(1024);
      await guest.run(`umount /mnt/${device}`);
      expect(await checksumsInImage(image, written.keys())).toEqual(written);
    }
  }, 180_000);
}
