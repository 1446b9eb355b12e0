import { expect, test } from "bun:test";
import { TRACKING_MODES } from "../../../src/virtio/admin/vendor.ts";
import { VendorMover } from "../../../src/virtio/movers/vendor.ts";
import { Life, reachedAdmin } from "./kill-lab.ts";
import { FrontEndLog, runningTracked } from "./tracking-lab.ts";
import { cleanUpAfterEach, disposeAll, disposeLater, soon } from "./vendor-lab.ts";

cleanUpAfterEach();

const PAGES = 640;
type Parts = Awaited<ReturnType<typeof runningTracked>>;

/** One process: its mover, and the way in which it dies. */
function processOf({ host, managed, admin, mover }: Parts) {
  const life = new Life();
  const own = new VendorMover(host, { ...managed, admin: reachedAdmin(admin.queue, life) }, mover.snapshot());
  disposeLater({ [Symbol.asyncDispose]: async () => own.abandon() });
  return { life, own };
}

type Act = (own: VendorMover, parts: Parts, logs: readonly FrontEndLog[]) => Promise<unknown>;

/** What is killed, after the device has begun to mark in the first log; in which log all has to be in the end. */
const ACTS: readonly (readonly [string, Act, number])[] = [
  ["a beginning", (own, _, [log]) => own.track(log!.tracking(), soon()), 0],
  ["a change of the log", (own, _, [, second]) => own.track(second!.tracking(), soon()), 1],
  ["a stop", (own, { rings }) => own.freeze(rings, "drained", soon()), 0],
  ["an end", (own) => own.track(undefined, soon()), 0],
];

const cases = TRACKING_MODES.flatMap((mode) => ACTS.map(([what, act, last]) => [mode, what, act, last] as const));
test.each(cases)("%s: a kill in the middle of %s loses no page", async (mode, _, act, last) => {
  let isOver = false;
  for (let killed = 1; !isOver; killed++) {
    const parts = await runningTracked([mode]);
    const { pf } = parts;
    const logs = [new FrontEndLog(PAGES), new FrontEndLog(PAGES)];
    const { life, own } = processOf(parts);
    if (act !== ACTS[0]![1]) await own.track(logs[0]!.tracking(), soon());
    pf.write(1, 3, 517);
    life.endsAfter(killed);
    const acting = act(own, parts, logs);
    acting.catch(() => {});
    isOver = (await Promise.race([life.died.promise, acting])) !== "died";
    life.endsAfter(0);
    own.abandon();
    pf.write(1, 9);
    // The session of the next process has it marked before it answers anything.
    const next = processOf(parts);
    await next.own.takeUp(soon(), { held: false });
    const log = logs[last]!;
    await next.own.track(log.tracking(), soon());
    pf.write(1, 600);
    await next.own.freeze(parts.rings, "drained", soon());
    const seen = new Set(log.take());
    for (const page of [3, 517, 9, 600])
      expect({ killed, page, isSeen: seen.has(page) }).toEqual({ killed, page, isSeen: true });
    await next.own.track(undefined, soon());
    expect(pf.vfs[0]!.tracking).toBeUndefined();
    life.bury();
    await acting.catch(() => {});
    await disposeAll();
  }
});
