import { expect, test } from "bun:test";
import { Lab } from "../kit/guest/lab.ts";

test("QEMU first: it waits for the daemon, then the guest boots and its disk works", async () => {
  await using lab = await Lab.create({ queues: 2 });
  const guest = await lab.startGuest();
  await Bun.sleep(300);
  expect(guest.bootCount).toBe(0);
  await lab.startDaemon();
  await guest.booted(1);
  await guest.run("dd if=/dev/urandom of=/tmp/a bs=64k count=16 && dd if=/tmp/a of=/dev/vda bs=64k oflag=direct");
  await guest.run("dd if=/dev/vda of=/tmp/b bs=64k count=16 iflag=direct && cmp /tmp/a /tmp/b");
}, 120_000);

test("firmware works through the VF, whoever started first and whoever listens", async () => {
  for (const listener of ["qemu", "daemon"] as const) {
    await using lab = await Lab.create({ listener });
    await lab.writeBootSector();
    // A VMM that connects gives up where nobody listens yet, so with the daemon listening it can only come second.
    const early = listener === "qemu" ? await lab.startFirmwareVm() : undefined;
    await lab.startDaemon();
    const machine = early ?? (await lab.startFirmwareVm());
    await machine.reached(20);
    await machine.vm.kill();
    const next = await lab.startFirmwareVm();
    await next.reached(20);
  }
}, 120_000);
