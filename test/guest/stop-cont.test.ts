import { expect, test } from "bun:test";
import { stat } from "node:fs/promises";
import { Lab } from "../kit/guest/lab.ts";
import { Load } from "../kit/guest/load.ts";

test("stop and cont under load: the disk stands still while stopped, and every write is read back right", async () => {
  await using lab = await Lab.ready({ queues: 4 });
  const guest = await lab.bootGuest({ processors: 2 });
  const load = await Load.start(guest, 16, 4);
  const modified = async () => (await stat(lab.disk, { bigint: true })).mtimeNs;
  for (let round = 0; round < 8; round++) {
    await guest.vm.qmp.execute("stop");
    const stopped = await modified();
    await Bun.sleep(100);
    expect(await modified()).toBe(stopped);
    await guest.vm.qmp.execute("cont");
    await load.progress();
  }
  expect(await load.stop()).toBeGreaterThan(8 * 4);
}, 180_000);
