import { expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import { imageChecksum } from "../kit/guest/disk-checks.ts";
import { Lab } from "../kit/guest/lab.ts";

const MIB = 2 ** 20;

test("a disk that grows is seen by the running guest, and its new blocks work", async () => {
  await using lab = await Lab.ready({ queues: 2, diskSize: 64 });
  const guest = await lab.bootGuest();
  for (const { device, image, stack } of lab.disks) {
    const size = async () => Number(await guest.run(`cat /sys/block/${device}/size`)) * 512;
    expect(await size()).toBe(64 * MIB);
    await stack.setDevice("size=96M");
    await Deadline.after(10_000, "the guest to see the new size").poll(
      async () => (await size()) === 96 * MIB || undefined,
      50,
    );
    const sum = await guest.run(`dd if=/dev/urandom of=/tmp/a bs=1M count=1 2> /dev/null
      dd if=/tmp/a of=/dev/${device} bs=1M seek=95 oflag=direct 2> /dev/null && sha256sum < /tmp/a`);
    expect(await imageChecksum(image, 95 * MIB, MIB)).toBe(sum.slice(0, 64));
  }
}, 120_000);
