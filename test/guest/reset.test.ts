import { expect, test } from "bun:test";
import { checksumsInGuest, checksumsInImage, fileSystemErrors, makeFileSystem } from "../kit/guest/disk-checks.ts";
import { Lab } from "../kit/guest/lab.ts";
import { Load } from "../kit/guest/load.ts";

/** KiB of the file system; the load writes behind it. */
const FILE_SYSTEM = 64 * 1024;

for (const queues of [1, 4]) {
  test(`a guest reboot and a reset in the middle of I/O lose nothing, ${queues} queues, and the disk works again`, async () => {
    await using lab = await Lab.ready({ queues });
    const guest = await lab.bootGuest({ processors: Math.min(queues, 2) });
    const written = await makeFileSystem(guest, FILE_SYSTEM);
    await guest.run("sync");
    await Load.start(guest, 64, 2);

    guest.post("reboot", "reboot -f");
    await guest.booted(2);
    await guest.run("mount /dev/vda /mnt");
    expect(await checksumsInGuest(guest)).toEqual(written);

    await guest.run("touch /mnt/second-boot && sync");
    await Load.start(guest, 64, 2);
    await guest.vm.qmp.execute("system_reset");
    await guest.booted(3);
    await guest.run("mount /dev/vda /mnt && ls /mnt/second-boot");
    expect(await checksumsInGuest(guest)).toEqual(written);
    const load = await Load.start(guest, 64, 2);
    expect(await load.stop()).toBeGreaterThan(0);

    await guest.run("umount /mnt");
    expect(await fileSystemErrors(lab.disk)).toBe("");
    expect(await checksumsInImage(lab.disk, written.keys())).toEqual(written);
  }, 180_000);
}
