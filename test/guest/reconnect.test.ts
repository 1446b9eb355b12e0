import { expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import { Lab, type LabDisk } from "../kit/guest/lab.ts";
import { Load } from "../kit/guest/load.ts";

const QUEUES = 4;

async function vfInfo({ stack }: LabDisk): Promise<{ readonly configured: boolean; readonly reason?: string }> {
  return JSON.parse(await stack.command("vf", "-i", stack.vf)).device;
}

test("the daemon drops the connection under load: a managed VF goes on, another waits for the guest's reset", async () => {
  await using lab = await Lab.ready({ queues: QUEUES });
  const guest = await lab.bootGuest({ processors: 2 });
  const [managed, unmanaged] = [lab.disk("vendor"), lab.disk("none")];
  const load = await Load.start(guest, [managed.device], 16, QUEUES);
  for (let round = 0; round < 2; round++) {
    await lab.renewVf(managed);
    await load.progress();
  }
  await managed.stack.setDevice("slow=20", "out-of-order=true");
  await lab.renewVf(managed);
  await load.progress();
  await managed.stack.stopDaemon();
  await lab.startDaemon(managed);
  await load.progress();

  await Load.start(guest, [unmanaged.device], 16, 1);
  await lab.renewVf(unmanaged);
  const refusal = await Deadline.after(10_000, "the unmanaged VF to be refused").poll(
    async () => (await vfInfo(unmanaged)).reason,
    50,
  );
  expect(refusal).toMatch(/is to resume at index \d+, but .*(can only begin at 0|is not known)/);
  await load.progress();
  expect(await load.stop()).toBeGreaterThan(4 * 2 * QUEUES);

  await guest.vm.qmp.execute("system_reset");
  await guest.booted(2);
  const again = await Load.start(guest, lab.devices, 16, 2);
  expect(await again.stop()).toBeGreaterThan(0);
}, 180_000);

test("a VMM that connects anew under load finds its managed VF again", async () => {
  await using lab = await Lab.ready({ queues: QUEUES, listener: "daemon", migrations: ["vendor"] });
  const guest = await lab.bootGuest({ processors: 2 });
  const managed = lab.disk("vendor");
  const load = await Load.start(guest, lab.devices, 16, QUEUES);
  for (const properties of [["slow=0"], ["slow=20", "out-of-order=true"]]) {
    await managed.stack.setDevice(...properties);
    await lab.renewVf(managed);
    await load.progress();
  }
  await managed.stack.stopDaemon();
  await lab.startDaemon(managed);
  await load.progress();
  expect(await load.stop()).toBeGreaterThan(3 * 2 * QUEUES);
}, 180_000);
