import { describe, expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { VhostdError } from "../../../src/base/errors.ts";
import { Request } from "../../../src/vhost-user/messages.ts";
import { LOG_BYTE, LOG_PAGE } from "../../../src/virtio/dirty-log.ts";
import { FeatureBit, featureBits, Status } from "../../../src/virtio/features.ts";
import { FrontendDirtyLog } from "../../kit/frontend/dirty-log.ts";
import { setLogBase, startLogging, stopLogging } from "../../kit/frontend/migration-messages.ts";
import { connect, LONG_QUIET, ONE_MEGABYTE, type Pair, REGIONS, startRunning } from "./harness.ts";

/** Orders of messages in which a log comes late, is given up, or is another than it was. */

const END = 0x1_0000_0000 + 8 * ONE_MEGABYTE;
const SHORT = 5;
const LOG_ALL = featureBits(FeatureBit.vhostLogAll);
const PAGES = REGIONS.reduce((sum, { size }) => sum + size / LOG_PAGE, 0);

async function running(quietPeriod = LONG_QUIET, queues = 2): Promise<Pair> {
  const pair = connect({ dirtyTracking: true, quietPeriod, queues });
  await startRunning(pair.frontend, queues);
  return pair;
}

function until(condition: () => boolean): Promise<true> {
  return Deadline.after(5_000, "what the test waits for").poll(() => condition() || undefined, 1);
}

describe("a log that comes after the device has begun to run", () => {
  /** As QEMU's net front-end begins while its VM migrates: rings are enabled first, and the log comes after the kicks. */
  async function begunWithoutLog(features: (all: bigint) => bigint): Promise<Pair> {
    const pair = connect({ dirtyTracking: true, quietPeriod: SHORT, queues: 2 });
    const { frontend, target } = pair;
    await startRunning(frontend, 2);
    await frontend.stop({ order: "new" });
    await frontend.enableAll(true);
    await frontend.setFeatures(features(frontend.features));
    await frontend.setStatus(Status.featuresOk);
    for (const queue of frontend.queues) await frontend.setupQueue(queue);
    // The front-end is not given any time for so long.
    await until(() => target.running !== undefined);
    return pair;
  }

  test("has all pages marked: nobody knows what was written before", async () => {
    await using pair = await begunWithoutLog((all) => all | LOG_ALL);
    using log = new FrontendDirtyLog(END);
    await setLogBase(pair.frontend, log);
    expect(pair.target.tracking).toBeDefined();
    expect(log.look()).toHaveLength(PAGES);
    log.take();
    using next = new FrontendDirtyLog(2 * END);
    await setLogBase(pair.frontend, next);
    expect(next.look()).toEqual([]);
  });

  test("has none marked where they were not to be until now, or where the device has not run", async () => {
    await using pair = await begunWithoutLog((all) => all);
    using log = new FrontendDirtyLog(END);
    await startLogging(pair.frontend, log);
    expect(log.look()).toEqual([]);
    await using other = connect({ dirtyTracking: true });
    await other.frontend.negotiate();
    await other.frontend.setFeatures(other.frontend.features | LOG_ALL);
    await other.frontend.setupMemory(REGIONS);
    await setLogBase(other.frontend, log);
    await other.frontend.startQueues(2, { size: 64 });
    expect(log.look()).toEqual([]);
  });
});

test("a log of a migration that was cancelled is not that of the next one: memory may have outgrown it", async () => {
  await using pair = await running();
  const { frontend, target, lines } = pair;
  using log = new FrontendDirtyLog(END);
  await startLogging(frontend, log);
  await stopLogging(frontend);
  await frontend.addRegion(frontend.memory.add(log.size * LOG_BYTE, ONE_MEGABYTE));
  await frontend.stop({ order: "new" });
  // The next one has begun while the VM was paused: bit 26 comes before the log.
  await frontend.setFeatures(frontend.features | LOG_ALL);
  expect(lines.filter((line) => line.includes("not every page"))).toEqual([]);
  expect(target.tracking).toBeUndefined();
  using bigger = new FrontendDirtyLog(frontend.memory.end);
  await setLogBase(frontend, bigger);
  expect(target.tracking?.end).toBe(frontend.memory.end);
});

test("a device that is stopped waits for another log where memory has outgrown the one that it has", async () => {
  await using pair = await running();
  const { frontend, target, lines } = pair;
  const losses = () => lines.filter((line) => line.includes("not every page"));
  using log = new FrontendDirtyLog(END);
  await startLogging(frontend, log);
  await frontend.stop({ order: "new" });
  await frontend.setFeatures(frontend.features | LOG_ALL);
  await frontend.addRegion(frontend.memory.add(log.size * LOG_BYTE, ONE_MEGABYTE));
  expect(target.tracking).toBeUndefined();
  using bigger = new FrontendDirtyLog(frontend.memory.end);
  await setLogBase(frontend, bigger);
  expect(target.tracking?.end).toBe(frontend.memory.end);
  expect(losses()).toEqual([]);
  // It begins to run without one.
  await frontend.addRegion(frontend.memory.add(bigger.size * LOG_BYTE, ONE_MEGABYTE));
  frontend.features |= LOG_ALL;
  await frontend.resumeQueues([0, 0]);
  expect(target.running).toBeUndefined();
  expect(losses()).toHaveLength(1);
  expect(bigger.look()).toHaveLength(PAGES + ONE_MEGABYTE / LOG_PAGE);
});

test("a VMM whose VM moves is answered by a device that does not stop, too: it is reset", async () => {
  for (const migrates of [false, true]) {
    await using pair = await running();
    const { frontend, target } = pair;
    using log = new FrontendDirtyLog(END);
    if (migrates) await startLogging(frontend, log);
    const { ring } = frontend.queues[1]!.driver;
    frontend.memory.write(ring.device + 2, Uint8Array.of(7, 1));
    target.before = (operation) => {
      if (operation === "stop") throw new VhostdError("freezeFailed", "it has not drained");
    };
    if (migrates) {
      expect(await frontend.getBase(0)).toBe(0);
      expect(await frontend.getBase(1)).toBe(0x107);
      expect(target.calls.at(-1)).toBe("reset");
      expect(log.look()).toEqual([]);
      // It may go on, where its VM does.
      await frontend.resumeQueues([0, 0x107]);
      expect(target.calls.at(-1)).toBe("start 0@0 1@263");
    } else {
      await frontend.getBase(0).catch(() => {});
      expect((await pair.ended).reason).toBe("it has not drained");
    }
  }
});

describe("where not all was marked", () => {
  test("another log is completed too, and the session waits until that was seen", async () => {
    await using pair = await running(SHORT);
    const { frontend, target } = pair;
    using one = new FrontendDirtyLog(END);
    using other = new FrontendDirtyLog(2 * END);
    await startLogging(frontend, one);
    target.loseTracking(new VhostdError("io", "the PF does not answer"));
    await frontend.askU64(Request.GET_STATUS);
    await setLogBase(frontend, other);
    expect(other.look()).toHaveLength(PAGES);
    one.take();
    await Bun.sleep(5 * SHORT);
    expect(pair.session.status.state).not.toBe("closed");
    other.take();
    expect((await pair.ended).reason).toBe("the PF does not answer");
  });

  test("a device that had to be reset has done what its used ring says", async () => {
    await using pair = await running(LONG_QUIET);
    const { frontend, target } = pair;
    using log = new FrontendDirtyLog(END);
    await startLogging(frontend, log);
    const { ring } = frontend.queues[1]!.driver;
    frontend.memory.write(ring.device + 2, Uint8Array.of(7, 1));
    target.before = (operation) => {
      if (operation === "stop") throw new VhostdError("freezeFailed", "it has not drained");
    };
    target.loseTracking(new VhostdError("io", "the PF does not answer"));
    await frontend.askU64(Request.GET_STATUS);
    target.before = () => {};
    expect(await frontend.getBase(0)).toBe(0);
    expect(await frontend.getBase(1)).toBe(0x107);
  });
});
