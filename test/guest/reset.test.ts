import { expect, test } from "bun:test";
import {
  type Checksums,
  checksumsInGuest,
  checksumsInImage,
  fileSystemErrors,
  makeFileSystem,
  mount,
} from "../kit/guest/disk-checks.ts";
import { Lab } from "../kit/guest/lab.ts";
import { Load } from "../kit/guest/load.ts";

/** KiB of the file system; the load writes behind it. */
const FILE_SYSTEM = 64 * 1024;

for (const queues of [1, 4]) {
  test(`a guest reboot and a reset in the middle of I/O lose nothing, ${queues} queues, and the disk works again`, async () => {
    await using lab = await Lab.ready({ queues });
    const guest = await lab.bootGuest({ processors: Math.min(queues, 2) });
    const written = new Map<string, Checksums>();
    for (const device of lab.devices) written.set(device, await makeFileSystem(guest, device, FILE_SYSTEM));
    await guest.run("sync");
    await Load.start(guest, lab.devices, 64, 2);

    guest.post("reboot", "reboot -f");
    await guest.booted(2);
    for (const [device, sums] of written) {
      await mount(guest, device);
      expect(await checksumsInGuest(guest, device)).toEqual(sums);
      await guest.run(`touch /mnt/${device}/second-boot`);
    }

    await guest.run("sync");
    await Load.start(guest, lab.devices, 64, 2);
    await guest.vm.qmp.execute("system_reset");
    await guest.booted(3);
    for (const [device, sums] of written) {
      await mount(guest, device);
      await guest.run(`ls /mnt/${device}/second-boot`);
      expect(await checksumsInGuest(guest, device)).toEqual(sums);
    }
    const load = await Load.start(guest, lab.devices, 64, 2);
    expect(await load.stop()).toBeGreaterThan(0);

    for (const { device, image } of lab.disks) {
      await guest.run(`umount /mnt/${device}`);
      expect(await fileSystemErrors(image)).toBe("");
      const sums = written.get(device)!;
      expect(await checksumsInImage(image, sums.keys())).toEqual(sums);
    }
  }, 180_000);
}
