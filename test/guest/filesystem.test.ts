import { expect, test } from "bun:test";
import {
  checksumsInGuest,
  checksumsInImage,
  fileSystemErrors,
  imageChecksum,
  makeFileSystem,
} from "../kit/guest/disk-checks.ts";
import { Lab } from "../kit/guest/lab.ts";

for (const queues of [1, 4]) {
  test(`a Linux guest makes a file system through ${queues} queues, and the image holds what it wrote`, async () => {
    await using lab = await Lab.ready({ queues });
    const guest = await lab.bootGuest({ processors: queues });
    expect(await guest.run("ls /sys/block/vda/mq | wc -l")).toBe(`${queues}`);
    expect(await guest.run("cat /sys/block/vda/size")).toBe(`${(128 * 2 ** 20) / 512}`);

    const written = await makeFileSystem(guest);
    expect(await checksumsInGuest(guest)).toEqual(written);
    await guest.run("umount /mnt");
    expect(await fileSystemErrors(lab.disk)).toBe("");
    expect(await checksumsInImage(lab.disk, written.keys())).toEqual(written);

    // Every processor has a queue of its own: direct writes from each, read back by this machine from the image.
    const mib = 2 ** 20;
    for (let cpu = 0; cpu < queues; cpu++) {
      const place = 100 + cpu;
      const sum = await guest.run(`dd if=/dev/urandom of=/tmp/raw bs=1M count=1 2> /dev/null
        taskset ${(1 << cpu).toString(16)} dd if=/tmp/raw of=/dev/vda bs=128k seek=${place * 8} oflag=direct 2> /dev/null
        sha256sum < /tmp/raw`);
      expect(await imageChecksum(lab.disk, place * mib, mib)).toBe(sum.slice(0, 64));
    }
  }, 120_000);
}
