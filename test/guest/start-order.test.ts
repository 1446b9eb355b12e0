import { expect, test } from "bun:test";
import { Lab } from "../kit/guest/lab.ts";

test("QEMU first: it waits for the daemons, then the guest boots and its disks work", async () => {
  await using lab = await Lab.create({ queues: 2 });
  const guest = await lab.startGuest();
  await Bun.sleep(300);
  expect(guest.bootCount).toBe(0);
  await lab.startDaemons();
  await guest.booted(1);
  for (const device of lab.devices) {
    await guest.run(`dd if=/dev/urandom of=/tmp/a bs=64k count=16
      dd if=/tmp/a of=/dev/${device} bs=64k oflag=direct
      dd if=/dev/${device} of=/tmp/b bs=64k count=16 iflag=direct && cmp /tmp/a /tmp/b`);
  }
}, 120_000);

test("firmware works through the VFs, whoever started first and whoever listens", async () => {
  for (const listener of ["qemu", "daemon"] as const) {
    await using lab = await Lab.create({ listener });
    await lab.writeBootSector();
    const early = await lab.startFirmwareVm();
    await lab.startDaemons();
    await early.reached(20);
    await early.vm.kill();
    const next = await lab.startFirmwareVm();
    await next.reached(20);
  }
}, 120_000);
