import { expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import type { Guest } from "../kit/guest/guest.ts";
import { awaitLink, configure, type LabNic, NetLab } from "../kit/guest/net-lab.ts";
import { lostPings, receivedBytes, startTraffic, stopTraffic } from "../kit/guest/traffic.ts";

const PAIRS = 2;

async function goesOn(guest: Guest, nic: LabNic): Promise<void> {
  const before = await receivedBytes(guest, nic);
  await Deadline.after(20_000, `traffic at ${nic.device}`).poll(
    async () => (await receivedBytes(guest, nic)) > before + 2 ** 20 || undefined,
    20,
  );
}

for (const listener of ["qemu", "daemon"] as const) {
  test(`a link that goes down and comes up is seen in the guest, and a TAP that vanishes; ${listener} listens`, async () => {
    await using lab = await NetLab.create({ pairs: PAIRS, vfs: 2, migrations: ["vendor"], listener });
    const [tested, other] = lab.nics as readonly [LabNic, LabNic];
    const guest = await lab.bootGuest({ processors: 2 });
    await configure(guest, lab.nics);
    await startTraffic(guest, lab.nics);
    for (const nic of lab.nics) await awaitLink(guest, nic, true);
    for (const nic of lab.nics) await goesOn(guest, nic);

    for (let round = 0; round < 2; round++) {
      await tested.stack.set(tested.vf, ["link=off"]);
      await awaitLink(guest, tested, false);
      expect((await tested.stack.vfInfo(tested.vf))["reason"]).toMatch(/^the link is down/);
      expect(await guest.run(`cat /sys/class/net/${other.device}/carrier`)).toBe("1");
      await goesOn(guest, other);
      await tested.stack.set(tested.vf, ["link=on"]);
      await awaitLink(guest, tested, true);
      await goesOn(guest, tested);
    }

    await lab.namespace.removeLink(tested.tap);
    await awaitLink(guest, tested, false);
    await goesOn(guest, other);
    await stopTraffic(guest);
    expect(await lostPings(guest, other)).toBe(0);
    expect(await guest.run(`cat /sys/class/net/${tested.device}/carrier`)).toBe("0");
    expect((await tested.stack.vfInfo(tested.vf))["reason"]).toMatch(/^the link is down/);
  }, 120_000);
}
