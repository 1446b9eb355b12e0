import { expect, test } from "bun:test";
import { DirtyLogMapping } from "../../../src/native/dirty-log.ts";
import { LOG_PAGE } from "../../../src/virtio/dirty-log.ts";
import { Migration } from "../../kit/frontend/migration.ts";
import { connectUncounted, fdsLeftBy, type Pair, REGIONS, startRunning } from "./harness.ts";

/** Behind all rings. */
const PLACE = 0x1_0000_0000 + (7 << 20);

/** A device writes a byte, and marks it where it should. */
function writeByDevice({ frontend, target }: Pair, gpa: number, marks = true): void {
  const region = frontend.memory.regions.find(({ file }) => gpa >= file.gpa && gpa < file.gpa + file.size);
  region!.file.write(gpa, Uint8Array.of(0x5a));
  if (!marks || target.tracking === undefined) return;
  const { fd, offset, size } = target.tracking.log;
  using log = new DirtyLogMapping(fd, offset, size);
  log.mark(gpa / LOG_PAGE, 1);
}

async function withPairs(body: (sources: Pair[], destinations: Pair[]) => Promise<void>): Promise<void> {
  const left = await fdsLeftBy(async () => {
    await using stack = new AsyncDisposableStack();
    const make = (options: { dirtyTracking?: boolean }) => stack.use(connectUncounted(options));
    const sources = [make({ dirtyTracking: true }), make({ dirtyTracking: true })];
    const [first, second] = sources as [Pair, Pair];
    await startRunning(first.frontend, 1);
    await second.frontend.negotiate();
    // Rings lie in the last region: the second device's are in another one.
    const [low, middle, high] = first.frontend.memory.regions;
    for (const region of [low, high, middle]) second.frontend.memory.share(region!);
    await second.frontend.handMemory();
    await second.frontend.startQueues(1, { size: 64, bufferSpace: 1 << 16 });
    await body(sources, [make({}), make({})]);
  });
  expect(left).toBe(0);
}

const frontends = (pairs: readonly Pair[]) => pairs.map(({ frontend }) => frontend);

for (const order of ["old", "new"] as const) {
  test(`two devices of a VM move with all that they wrote, order ${order}`, async () => {
    await withPairs(async (sources, destinations) => {
      writeByDevice(sources[0]!, PLACE, false);
      using migration = await Migration.begin(frontends(sources));
      expect(migration.differences()).toEqual([]);
      expect(migration.pass()).toBe(0);
      writeByDevice(sources[0]!, PLACE + LOG_PAGE);
      writeByDevice(sources[1]!, PLACE + 2 * LOG_PAGE);
      expect(migration.pass()).toBe(2);
      sources[1]!.frontend.queues[0]!.driver.ring.submit([new Uint8Array(1)], []);
      for (const { frontend } of destinations) await frontend.negotiate();
      await migration.stop({ order });
      expect(migration.bases).toEqual([[0], [1]]);
      migration.pass();
      expect(migration.differences()).toEqual([]);
      await migration.arrive(frontends(destinations));
      expect(destinations.map(({ target }) => target.calls.at(-1))).toEqual(["start 0@0", "start 0@1"]);
      expect(destinations[1]!.frontend.memory.read(PLACE + LOG_PAGE, 1)).toEqual(Uint8Array.of(0x5a));
      expect(destinations[0]!.frontend.memory.regions).toHaveLength(REGIONS.length);
    });
  });
}

test("a page that a device wrote and did not mark is found", async () => {
  await withPairs(async (sources) => {
    using migration = await Migration.begin(frontends(sources));
    writeByDevice(sources[1]!, PLACE, false);
    migration.pass();
    expect(migration.differences()).toEqual([PLACE]);
  });
});

test("a migration that is cancelled leaves the devices as they were", async () => {
  await withPairs(async (sources) => {
    using migration = await Migration.begin(frontends(sources));
    expect(sources.map(({ target }) => target.tracking?.log.size)).toEqual([migration.log.size, migration.log.size]);
    await migration.cancel();
    for (const { frontend, target } of sources) {
      expect(await frontend.getBase(3)).toBe(0);
      expect(target.tracking).toBeUndefined();
      expect(target.running).toBeDefined();
    }
  });
});
