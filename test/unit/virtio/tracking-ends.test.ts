import { expect, test } from "bun:test";
import { TRACKING_MODES } from "../../../src/virtio/admin/vendor.ts";
import { rejection } from "../../kit/rejection.ts";
import { allPages, FrontEndLog, runningTracked } from "./tracking-lab.ts";
import { cleanUpAfterEach, soon } from "./vendor-lab.ts";

cleanUpAfterEach();

/** How a device may end to mark what it writes other than by being told to. */

for (const mode of TRACKING_MODES) {
  test(`one that has ended by itself is found out when it is frozen: ${mode}`, async () => {
    const { mover, vf, rings } = await runningTracked([mode]);
    const lost: Error[] = [];
    mover.onTrackingLost((error) => lost.push(error));
    const log = new FrontEndLog(100);
    await mover.track(log.tracking(), soon());
    vf.tracking = undefined;
    await mover.freeze(rings, "drained", soon());
    expect(lost).toHaveLength(1);
    expect(log.take()).toEqual(allPages(100));
  });

  test(`one whose end was answered too late can begin again: ${mode}`, async () => {
    const { mover, pf, vf, rings } = await runningTracked([mode]);
    const log = new FrontEndLog(100);
    await mover.track(log.tracking(), soon());
    const { promise: late, resolve: answer } = Promise.withResolvers<void>();
    pf.answer = async (asked) => {
      if (asked.name === "stopTracking") await late;
      return pf.honest(asked);
    };
    expect(await rejection(mover.track(undefined, soon(50)))).toMatchObject({ code: "io" });
    answer();
    await soon().poll(() => vf.tracking === undefined || undefined, 1);
    pf.answer = (asked) => pf.honest(asked);
    log.take();
    await mover.track(log.tracking(), soon());
    pf.write(1, 3);
    await mover.freeze(rings, "drained", soon());
    expect(log.take()).toEqual([3]);
    await mover.track(undefined, soon());
    expect(pf.maps).toBe(0);
  });

  test(`one that refuses to end goes on, and its map stays: ${mode}`, async () => {
    const { mover, pf } = await runningTracked([mode]);
    const log = new FrontEndLog(100);
    await mover.track(log.tracking(), soon());
    const { maps } = pf;
    pf.answer = (asked) => (asked.name === "stopTracking" ? { status: 0x81 } : pf.honest(asked));
    expect(await rejection(mover.track(undefined, soon()))).toMatchObject({ code: "io" });
    expect(pf.maps).toBe(maps);
  });
}
