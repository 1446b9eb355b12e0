import { expect, test } from "bun:test";
import { stat } from "node:fs/promises";
import { Lab } from "../kit/guest/lab.ts";
import { Load } from "../kit/guest/load.ts";

/** Queues, and rounds of stop and cont. */
const RUNS = [
  [1, 4],
  [4, 8],
] as const;

for (const [queues, rounds] of RUNS) {
  test(`stop and cont under load, ${queues} queues: the disk stands still while stopped, every write is read back right`, async () => {
    await using lab = await Lab.ready({ queues });
    const guest = await lab.bootGuest({ processors: Math.min(queues, 2) });
    const load = await Load.start(guest, 16, queues);
    const modified = async () => (await stat(lab.disk, { bigint: true })).mtimeNs;
    for (let round = 0; round < rounds; round++) {
      await guest.vm.qmp.execute("stop");
      const stopped = await modified();
      await Bun.sleep(100);
      expect(await modified()).toBe(stopped);
      await guest.vm.qmp.execute("cont");
      await load.progress();
    }
    expect(await load.stop()).toBeGreaterThan(rounds * queues);
  }, 180_000);
}
