import { expect, test } from "bun:test";
import { NetLab } from "../kit/guest/net-lab.ts";
import { Vm } from "../kit/guest/vm.ts";

/** Milliseconds from QEMU's start to the lease. iPXE lets three seconds pass after the first offer. */
const LEASE_TIMEOUT = 60_000;

test("iPXE, the firmware of VMs without a system, asks for an address and gets it, through either kind of VF", async () => {
  await using lab = await NetLab.create();
  await using vms = new AsyncDisposableStack();
  const waiting = lab.nics.map(async ({ tap, guestAddress }, index) => {
    const server = await lab.services.serveDhcp({ device: tap, first: guestAddress, last: guestAddress });
    const options = lab.vmOptions("ipxe");
    const nics = [{ ...options.nics![index]!, bootable: true }];
    const vm = vms.use(await Vm.start({ ...options, nics, memory: 64 }));
    const lease = server.line(new RegExp(`sending ACK to ${guestAddress}`), LEASE_TIMEOUT);
    await Promise.race([lease, vm.qemu.exited]);
    expect(vm.qemu.running).toBe(true);
  });
  await Promise.all(waiting);
}, 120_000);
