import { expect, test } from "bun:test";
import {
  checksumsInGuest,
  checksumsInImage,
  fileSystemErrors,
  imageChecksum,
  makeFileSystem,
} from "../kit/guest/disk-checks.ts";
import { Lab } from "../kit/guest/lab.ts";

const MIB = 2 ** 20;

for (const queues of [1, 4]) {
  test(`a Linux guest makes a file system through ${queues} queues, and the image holds what it wrote`, async () => {
    await using lab = await Lab.ready({ queues });
    const guest = await lab.bootGuest({ processors: queues });
    for (const { device, image } of lab.disks) {
      expect(await guest.run(`ls /sys/block/${device}/mq | wc -l`)).toBe(`${queues}`);
      expect(await guest.run(`cat /sys/block/${device}/size`)).toBe(`${(128 * MIB) / 512}`);

      const written = await makeFileSystem(guest, device);
      expect(await checksumsInGuest(guest, device)).toEqual(written);
      await guest.run(`umount /mnt/${device}`);
      expect(await fileSystemErrors(image)).toBe("");
      expect(await checksumsInImage(image, written.keys())).toEqual(written);

      // Every processor has a queue of its own: direct writes from each, read back by this machine from the image.
      for (let cpu = 0; cpu < queues; cpu++) {
        const place = 100 + cpu;
        const sum = await guest.run(`dd if=/dev/urandom of=/tmp/raw bs=1M count=1 2> /dev/null
          taskset ${(1 << cpu).toString(16)} dd if=/tmp/raw of=/dev/${device} bs=128k seek=${place * 8} oflag=direct 2> /dev/null
          sha256sum < /tmp/raw`);
        expect(await imageChecksum(image, place * MIB, MIB)).toBe(sum.slice(0, 64));
      }
    }
  }, 120_000);
}
