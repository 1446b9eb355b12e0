import { expect, test } from "bun:test";
import { stat } from "node:fs/promises";
import type { Guest } from "../kit/guest/guest.ts";
import { Lab } from "../kit/guest/lab.ts";
import { Load } from "../kit/guest/load.ts";

/** Queues, rounds of stop and cont, and what a managed VF does with requests in flight when it is slow. */
const RUNS = [
  [1, 4, "freeze=hold"],
  [4, 8, "freeze=list"],
] as const;
/** Rounds in which every request takes its time and requests complete in any order. */
const SLOW_ROUNDS = 2;

/** Stops the VM for a moment, in which no disk changes, and waits until every worker has gone on. */
async function stopAndContinue(lab: Lab, guest: Guest, load: Load): Promise<void> {
  const modified = () => Promise.all(lab.disks.map(async ({ image }) => (await stat(image, { bigint: true })).mtimeNs));
  await guest.vm.qmp.execute("stop");
  const stopped = await modified();
  await Bun.sleep(100);
  expect(await modified()).toEqual(stopped);
  await guest.vm.qmp.execute("cont");
  await load.progress();
}

for (const [queues, rounds, freeze] of RUNS) {
  test(`stop and cont under load, ${queues} queues: the disks stand still while stopped, every write is read back right`, async () => {
    await using lab = await Lab.ready({ queues });
    const guest = await lab.bootGuest({ processors: Math.min(queues, 2) });
    const load = await Load.start(guest, lab.devices, 16, queues);
    for (let round = 0; round < rounds; round++) await stopAndContinue(lab, guest, load);
    for (const { stack } of lab.disks) await stack.setDevice("slow=20", "out-of-order=true");
    await lab.disk("vendor").stack.setPf(freeze);
    for (let round = 0; round < SLOW_ROUNDS; round++) await stopAndContinue(lab, guest, load);
    expect(await load.stop()).toBeGreaterThan(rounds * queues * lab.disks.length);
  }, 180_000);
}
