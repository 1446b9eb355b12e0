import { expect, test } from "bun:test";
import { Lab, type LabDisk } from "../kit/guest/lab.ts";
import { Load } from "../kit/guest/load.ts";

/** Operations of `vf -d`, and the internal status after each. */
const RUN = "1";
const QUIESCE = "2";
const FREEZE = "3";
const STATUS = "6";
const [RUNNING, QUIESCED, FREEZED] = ["1", "2", "3"] as const;

/** `vf -d`. @returns the internal status */
async function change({ stack }: LabDisk, operation: string): Promise<string> {
  const answer = JSON.parse(await stack.command("vf", "-d", stack.vf, "-o", operation));
  return answer.device.lm_status;
}

test("an operator sees which VFs are managed, and moves the state of one by hand under load", async () => {
  await using lab = await Lab.ready({ queues: 2 });
  const guest = await lab.bootGuest({ processors: 2 });
  const [managed, unmanaged] = [lab.disk("vendor"), lab.disk("none")];
  for (const { migration, stack } of lab.disks) {
    const expected = migration === "vendor" ? { managed: true, migration: "vendor 1.0.0" } : { managed: false };
    expect(JSON.parse(await stack.command("mgmtpf", "-l")).devices).toMatchObject([{ pf: stack.pf, ...expected }]);
    const { device } = JSON.parse(await stack.command("vf", "-i", stack.vf));
    expect(device).toMatchObject(
      migration === "vendor"
        ? { managed: true, mover: "vendor", configured: true }
        : { managed: false, mover: "registers", configured: true, unmanaged_reason: expect.any(String) },
    );
  }
  const refused = await unmanaged.stack.cli("vf", "-d", unmanaged.stack.vf, "-o", STATUS);
  expect(refused).toMatchObject({ code: 1, output: expect.stringContaining("cannot be moved") });

  const load = await Load.start(guest, [managed.device], 16, 2);
  const other = await Load.start(guest, [unmanaged.device], 16, 2);
  expect(await change(managed, STATUS)).toBe(RUNNING);
  const standsStill = async () => {
    // What was given back before may still be on its way through the guest.
    await other.progress();
    const before = await load.rounds();
    await other.progress();
    expect(await load.rounds()).toEqual(before);
  };

  for (const way of [[QUIESCE], [FREEZE, QUIESCE]]) {
    for (const operation of way) {
      // The numbers of these operations are those of the status that they lead to.
      expect(await change(managed, operation)).toBe(operation);
      expect(await change(managed, STATUS)).toBe(operation);
    }
    await standsStill();
    expect(await change(managed, RUN)).toBe(RUNNING);
    await load.progress();
  }

  // Whatever the operator did, the VMM stops and starts the device as it needs.
  for (const [operation, status] of [
    [QUIESCE, QUIESCED],
    [FREEZE, FREEZED],
  ] as const) {
    expect(await change(managed, operation)).toBe(status);
    await guest.vm.qmp.execute("stop");
    await guest.vm.qmp.execute("cont");
    expect(await change(managed, STATUS)).toBe(RUNNING);
    await load.progress();
  }
  expect(await load.stop()).toBeGreaterThan(0);

  await change(managed, FREEZE);
  await guest.vm.qmp.execute("system_reset");
  await guest.booted(2);
  const again = await Load.start(guest, lab.devices, 16, 2);
  expect(await again.stop()).toBeGreaterThan(0);
}, 180_000);
