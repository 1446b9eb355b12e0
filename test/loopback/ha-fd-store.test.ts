import { expect, test } from "bun:test";
import { join } from "node:path";
import { FakeSystemd } from "../kit/fake-systemd.ts";
import { HaLab } from "../kit/ha-lab.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";

const ENTRY = join(import.meta.dir, "../../bin/vhostd.ts");

/** What systemd starts: it says by its own number for whom the fds are. */
const SERVICE = ["bash", "-c", 'export LISTEN_PID=$$; exec "$@"', "service", process.execPath, ENTRY];

test("without a keeper systemd's fd store keeps what a killed daemon had: the next one goes on under load", async () => {
  await using lab = await HaLab.create({ keeper: false });
  using systemd = new FakeSystemd({ max: 1000 });
  const options = () => ({
    program: SERVICE,
    environment: systemd.environment,
    fds: systemd.stored.map(({ fd }) => fd.number),
    arguments: ["--ha", "fd-store"],
  });
  await lab.startDaemon(options());
  await lab.addPf();
  const { listener, frontend } = await lab.connect();
  using _listener = listener;
  using _frontend = frontend;
  await frontend.negotiate();
  await frontend.setupMemory([{ gpa: 0, size: 16 << 20 }]);
  await frontend.startQueues(1);
  const disk = new VerifiedDisk();
  const load = disk.runOn(frontend.queues[0]!.driver, 4);
  await load.progress(50);
  for (let kill = 0; kill < 3; kill++) {
    await lab.daemon.kill();
    lab.spawnDaemon(options());
    await lab.takenUp();
    await load.progress(50);
    expect(await lab.call("stats")).toMatchObject({ vfs: 1, sessions: 1, protected: true });
  }
  await load.stop();
  await disk.verifyAll(frontend.queues[0]!.driver);
  expect(await lab.call("version")).toMatchObject({ "vfe-vhostd-ha version": expect.any(String) });

  // Nobody wants it any more: all that was stored is closed.
  await lab.daemon.kill();
  lab.spawnDaemon({ ...options(), arguments: ["--ha", "off"] });
  await lab.ready();
  await frontend.hungUp();
  expect(systemd.stored).toEqual([]);
}, 60_000);
