import { expect, test } from "bun:test";
import { liveFds } from "../../src/native/fd.ts";
import { Migration } from "../kit/frontend/migration.ts";
import { RegistryLab } from "../kit/registry-lab.ts";
import { rejection } from "../kit/rejection.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";

/** What operators see and do of migrations, with devices that track. */

test("a migration from one VF to another: events, phases, and what is written", async () => {
  const before = liveFds();
  {
    await using lab = await RegistryLab.create();
    const { registry, vf, vf2 } = lab;
    const events: unknown[] = [];
    using _subscription = registry.onEvent((event) => {
      if (event.type === "migration") events.push([event.vf, event.state]);
    });
    await registry.addPf(lab.pf);
    await lab.serve(vf);
    await lab.serve(vf2);
    using source = lab.dial(vf);
    using destination = lab.dial(vf2);
    await lab.run(source);
    expect(registry.vfInfo(vf).migration).toBeNull();
    const disk = new VerifiedDisk();
    await disk.steps(source.queues[0]!.driver, 20);
    {
      using migration = await Migration.begin([source]);
      expect(registry.vfInfo(vf).migration).toMatchObject({ state: "tracking" });
      await migration.cancel();
      // Cancelling asks for no answer.
      await source.negotiate();
    }
    using migration = await Migration.begin([source]);
    await disk.steps(source.queues[0]!.driver, 20);
    migration.pass();
    await migration.stop({ order: "new" });
    migration.pass();
    await destination.negotiate();
    await migration.arrive([destination]);
    await disk.steps(destination.queues[0]!.driver, 20);
    const { phases } = registry.vfInfo(vf).migration!;
    expect(Object.keys(phases).sort()).toEqual(["begin_tracking", "freeze", "kicks_off", "stop", "tracking"]);
    expect(Object.keys(registry.vfInfo(vf2).migration!.phases)).toEqual(["start"]);
    const states = ["tracking", "none", "tracking", "handed-over"].map((state) => [vf, state]);
    expect(events).toEqual([...states, [vf2, "arrived"]]);
  }
  expect(liveFds()).toBe(before);
}, 30_000);

for (const { tracking, map, mode } of [
  { tracking: "pull-bitmap,push-bytemap", map: "bytemap", mode: "push-bytemap" },
  { tracking: "push-bitmap,pull-bytemap", map: undefined, mode: "push-bitmap" },
] as const) {
  test(`a log by hand counts the pages that a VF wrote: ${tracking}, ${map ?? "any"} asked for`, async () => {
    const before = liveFds();
    {
      await using lab = await RegistryLab.create({ softvf: ["--tracking", tracking] });
      const { registry, vf } = lab;
      await registry.addPf(lab.pf);
      await lab.serve();
      using frontend = lab.dial();
      await lab.run(frontend);
      const { driver } = frontend.queues[0]!;
      expect(await registry.logVf(vf, "start-logging", map)).toEqual({ mode });
      await new VerifiedDisk().steps(driver, 50);
      const { pages, ...rest } = await registry.logVf(vf, "stop-logging");
      expect(rest).toMatchObject({ mode });
      // Its used ring at least; and not all of memory.
      expect(pages).toBeGreaterThan(0);
      expect(pages).toBeLessThan(frontend.memory.end / 4096);
      // A front-end that begins meanwhile has a log of its own, which is complete.
      await registry.logVf(vf, "start-logging");
      using migration = await Migration.begin([frontend]);
      await new VerifiedDisk().steps(driver, 20);
      expect(await rejection(registry.logVf(vf, "start-logging"))).toMatchObject({ code: "busy" });
      await migration.stop({ order: "new" });
      migration.pass();
      expect(migration.differences()).toEqual([]);
      expect(await rejection(registry.logVf(vf, "stop-logging"))).toMatchObject({
        message: expect.stringContaining("its front-end logs itself"),
      });
    }
    expect(liveFds()).toBe(before);
  }, 30_000);
}
