import { expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import type { Guest } from "../kit/guest/guest.ts";
import { awaitLink, configure, type LabNic, NetLab } from "../kit/guest/net-lab.ts";
import { lostPings, receivedBytes, startTraffic, stopTraffic } from "../kit/guest/traffic.ts";

const MIB = 2 ** 20;

/** Waits until TCP has brought another few MiB through the card. */
async function progress(guest: Guest, nic: LabNic): Promise<void> {
  const before = await receivedBytes(guest, nic);
  await Deadline.after(30_000, `traffic at ${nic.device}`).poll(
    async () => (await receivedBytes(guest, nic)) > before + 4 * MIB || undefined,
    20,
  );
}

/** A guest that has just booted: addresses, pings, and TCP that goes on. */
async function takeUp(lab: NetLab, guest: Guest): Promise<void> {
  await configure(guest, lab.nics);
  for (const nic of lab.nics) expect(await lostPings(guest, nic)).toBe(0);
  await startTraffic(guest, lab.nics);
  for (const nic of lab.nics) await progress(guest, nic);
}

test("under traffic: reboot, a killed VMM, stop and cont, lost connections, reset; four pairs of queues and one", async () => {
  await using lab = await NetLab.create({ pairs: { vendor: 4, none: 1 } });
  const [managed, unmanaged] = [lab.nic("vendor"), lab.nic("none")];
  const first = await lab.bootGuest({ processors: 2 });
  await takeUp(lab, first);
  // A kernel that shuts its cards down under traffic may spin for ever: Linux 6.1 sends until a broken ring has room.
  await stopTraffic(first);
  first.post("reboot", "reboot -f");
  await first.booted(2);
  await takeUp(lab, first);
  await first.vm.kill();

  const second = await lab.bootGuest({ processors: 2 });
  await takeUp(lab, second);
  await second.vm.qmp.execute("stop");
  await Bun.sleep(100);
  await second.vm.qmp.execute("cont");
  for (const nic of lab.nics) await progress(second, nic);
  for (let round = 0; round < 2; round++) {
    await lab.renewVf(managed);
    await awaitLink(second, managed, true);
    for (const nic of lab.nics) await progress(second, nic);
    expect(await lostPings(second, managed)).toBe(0);
  }
  await lab.renewVf(unmanaged);
  const refusal = await Deadline.after(10_000, "the unmanaged VF to be refused").poll(
    async () => (await unmanaged.stack.vfInfo(unmanaged.vf))["reason"],
    50,
  );
  expect(refusal).toMatch(/is to resume at index \d+, but /);
  await progress(second, managed);

  await second.vm.qmp.execute("system_reset");
  await second.booted(2);
  await takeUp(lab, second);
  // A VF that went on with the rings of a guest that was reset would have read nonsense there.
  for (const { stack } of lab.nics) expect(stack.daemon.log).not.toContain("needs a reset");
}, 180_000);
