import { expect, test } from "bun:test";
import { HaLab } from "../kit/ha-lab.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";

test("a daemon that is killed under load is followed by one that goes on: no request lost, no reconnect", async () => {
  await using lab = await HaLab.create({ queues: 2 });
  await lab.startDaemon();
  await lab.addPf();
  const { listener, frontend } = await lab.connect();
  using _ = listener;
  using _frontend = frontend;
  await frontend.negotiate();
  await frontend.setupMemory([{ gpa: 0, size: 16 << 20 }]);
  await frontend.startQueues(2);
  const disk = new VerifiedDisk();
  const load = disk.runOn(frontend.queues[0]!.driver, 4);
  await load.progress(50);
  for (let kill = 0; kill < 5; kill++) {
    await lab.replaceDaemon();
    await lab.takenUp();
    await load.progress(100);
  }
  await load.stop();
  await disk.verifyAll(frontend.queues[0]!.driver);
  const bases = await frontend.stop({ order: "new" });
  await frontend.resumeQueues(bases);
  await disk.steps(frontend.queues[1]!.driver, 20);
  expect(await lab.call("stats")).toMatchObject({ vfs: 1, sessions: 1, protected: true });
}, 60_000);
