import { expect, test } from "bun:test";
import { mkdtemp, rm, truncate, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { liveFds } from "../../src/native/fd.ts";
import { LOG_PAGE } from "../../src/virtio/dirty-log.ts";
import { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { Migration } from "../kit/frontend/migration.ts";
import { stopLogging } from "../kit/frontend/migration-messages.ts";
import { Stack } from "../kit/guest/stack.ts";
import { RegistryLab, type RegistryLabOptions } from "../kit/registry-lab.ts";
import { rejection } from "../kit/rejection.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";

/** A VF that is to go while its VM migrates: what it has written must not be missing where the VM arrives. */

const soon = (time = 10_000) => Deadline.after(time, "the test");

async function withMigration(
  work: (lab: RegistryLab, parts: Parts) => Promise<void>,
  { fault = "", ...options }: RegistryLabOptions & { fault?: string } = {},
) {
  const before = liveFds();
  {
    await using lab = await RegistryLab.create(options);
    await lab.registry.addPf(lab.pf);
    await lab.serve();
    using frontend = lab.dial();
    await lab.run(frontend);
    await lab.set(lab.pf, { "admin-fault": fault });
    const parts = await begin(frontend);
    using _migration = parts.migration;
    await work(lab, parts);
  }
  expect(liveFds()).toBe(before);
}

type Parts = Awaited<ReturnType<typeof begin>>;

async function begin(frontend: ReturnType<RegistryLab["dial"]>) {
  const disk = new VerifiedDisk();
  const io = () => disk.steps(frontend.queues[0]!.driver, 20);
  await io();
  const migration = await Migration.begin([frontend]);
  const pages = frontend.memory.regions.reduce((sum, { file }) => sum + file.size / LOG_PAGE, 0);
  return { frontend, migration, io, pages };
}

test("a VF is not removed while its VM migrates, unless that is forced", async () => {
  await withMigration(async ({ registry, vf }, { frontend, io }) => {
    expect(await rejection(registry.removeVf(vf))).toMatchObject({
      code: "busy",
      fix: expect.stringMatching(/--force/),
    });
    await io();
    expect(registry.vfInfo(vf).migration).toMatchObject({ state: "tracking" });
    await registry.removeVf(vf, { force: true });
    await frontend.hungUp();
    expect(registry.listVfs()).toEqual([]);
  });
}, 30_000);

test.each(["cancelled", "over"])(
  "a VF whose migration is %s is removed",
  async (how) => {
    await withMigration(async ({ registry, vf }, { frontend, migration }) => {
      if (how === "over") await migration.stop({ order: "new" });
      else {
        await stopLogging(frontend);
        await frontend.getConfig(0, 8);
      }
      await registry.removeVf(vf);
      expect(registry.listVfs()).toEqual([]);
    });
  },
  30_000,
);

test("a VF that lost track of what it wrote is removed when the VMM has looked, whatever its front-end does then", async () => {
  const work = async ({ registry, vf, ...lab }: RegistryLab, { frontend, migration, pages }: Parts) => {
    await soon().poll(() => migration.log.look().length >= pages || undefined, 5);
    expect(await rejection(registry.removeVf(vf))).toMatchObject({ code: "busy" });
    const looks = setInterval(() => migration.log.take(), 20);
    await frontend.hungUp();
    clearInterval(looks);
    // It comes back, and does not start.
    using again = VhostUserFrontend.connect(join(lab.directory, `${vf}.sock`));
    await again.negotiate();
    await again.getConfig(0, 8);
    await registry.leaveMigrations(soon(0));
    expect(lab.warnings.filter((line) => /did not read/.test(line))).toEqual([]);
    await registry.removeVf(vf);
  };
  await withMigration(work, { fault: "pending-map@0:fail" });
  await withMigration(work, { fault: "start-tracking@0:fail" });
}, 40_000);

test("a daemon that ends lets the VMM read what was written first", async () => {
  await withMigration(async (lab, { frontend, migration, io, pages }) => {
    const { registry, vf } = lab;
    await io();
    let hasLeft = false;
    const left = registry.leaveMigrations(soon()).then(() => {
      hasLeft = true;
    });
    await soon().poll(() => migration.log.look().length >= pages || undefined, 5);
    expect(registry.vfInfo(vf).migration).toMatchObject({ state: "lost" });
    await Bun.sleep(200);
    expect(hasLeft).toBe(false);
    migration.pass();
    await left;
    await frontend.hungUp();
    expect(migration.differences()).toEqual([]);
  });
}, 30_000);

test("a daemon that ends does not wait for a VMM that does not look", async () => {
  await withMigration(async (lab, { migration, pages }) => {
    await lab.registry.leaveMigrations(soon(500));
    expect(lab.warnings.filter((line) => /did not read in time/.test(line))).toHaveLength(1);
    expect(migration.log.look()).toHaveLength(pages);
    // Whoever does not migrate is not waited for.
    await lab.registry.leaveMigrations(soon(0)).then(() => lab.registry.removeVf(lab.vf, { force: true }));
    await lab.registry.leaveMigrations(soon());
  });
}, 30_000);

test("a VM that begins to migrate while another is waited for is waited for, too", async () => {
  await withMigration(async (lab, { migration }) => {
    const { registry, vf2 } = lab;
    await lab.serve(vf2);
    using frontend = lab.dial(vf2);
    await lab.run(frontend);
    const left = registry.leaveMigrations(soon());
    const second = await begin(frontend);
    using _migration = second.migration;
    await soon().poll(() => second.migration.log.look().length >= second.pages || undefined, 5);
    migration.pass();
    second.migration.pass();
    await left;
    expect(second.migration.differences()).toEqual([]);
    expect(lab.warnings.filter((line) => /did not read/.test(line))).toEqual([]);
  });
}, 30_000);

test("a device that does not stop is reset in time for the VMM to look", async () => {
  const deadlines = { drain: 60_000, lastDrain: 300 };
  await withMigration(
    async (lab, { frontend, migration, pages }) => {
      await lab.set(lab.pf, { "admin-fault": "modify@0:retry" });
      const left = lab.registry.leaveMigrations(soon(15_000));
      await soon(14_000).poll(() => migration.log.look().length >= pages || undefined, 5);
      migration.pass();
      await left;
      await frontend.hungUp();
    },
    { deadlines },
  );
}, 40_000);

test("vfe-vhostd, told to end, ends when the VMM has looked", async () => {
  await using undo = new AsyncDisposableStack();
  const directory = await mkdtemp(join(tmpdir(), "leave-"));
  undo.defer(() => rm(directory, { recursive: true }));
  const disk = join(directory, "disk");
  await writeFile(disk, "");
  await truncate(disk, 64 << 20);
  const stack = undo.use(await Stack.start({ directory, disk }));
  await stack.startDaemon();
  const socket = join(directory, "vhostd.sock");
  await stack.addVf(socket, "--server");
  using frontend = VhostUserFrontend.connect(socket);
  await frontend.negotiate();
  await frontend.setupMemory([{ gpa: 0, size: 32 << 20 }]);
  await frontend.startQueues(1);
  const { migration, io, pages } = await begin(frontend);
  using _migration = migration;
  await io();
  const { daemon } = stack;
  expect(await rejection(stack.command("vf", "-r", stack.vf))).toMatchObject({
    message: expect.stringMatching(/--force/),
  });
  daemon.signal("SIGTERM");
  await soon().poll(() => migration.log.look().length >= pages || undefined, 5);
  expect(daemon.running).toBe(true);
  migration.pass();
  expect(await soon().race(daemon.exited)).toBe(0);
  expect(migration.differences()).toEqual([]);
}, 60_000);
