import { expect, test } from "bun:test";
import { silentLogger } from "../../../src/base/log.ts";
import { Link, type LinkBefore, type LinkGuest } from "../../../src/daemon/link.ts";

const UP = Uint8Array.of(1);
const DOWN = Uint8Array.of(0);
const PID = 77;

/** A link whose device has one byte of configuration space: 1 while it is up. */
function make(before: LinkBefore = { config: UP }, { hearsOfChanges = false, managed = true, linkUp = true } = {}) {
  const lab = {
    closed: [] as string[],
    troubles: [] as (string | undefined)[],
    /** Times that the record was to be written. */
    noted: 0,
    changed: () => {},
    looks: 0,
    /** Questions that fail first. */
    failures: 0,
    running: true,
    config: UP as Uint8Array,
    link: undefined as unknown as Link,
    /** The configuration space changes, and somebody reads it. */
    see(config: Uint8Array) {
      lab.config = config;
      lab.link.seen(config);
    },
    [Symbol.dispose]: () => lab.link[Symbol.dispose](),
  };
  const guest: LinkGuest = { peer: PID, hearsOfChanges, close: (reason) => lab.closed.push(reason) };
  const features = 1n << 16n;
  lab.link = new Link(
    {
      deviceClass: {
        configSpace: { status: [0, "u8"] },
        ...(linkUp ? { linkUp: ({ status }, seen) => seen === features && status === 1 } : {}),
      },
      deviceFeatures: features,
      log: silentLogger,
      readConfig: async () => {
        if (lab.failures-- > 0) throw new Error("the device is being reset");
        lab.looks++;
        lab.link.seen(lab.config);
      },
      guest: () => (lab.running ? guest : undefined),
      canReconnect: () => managed,
      onChange: () => {
        lab.troubles.push(lab.link.trouble);
        lab.changed();
      },
      onRecord: () => void lab.noted++,
      interval: 2,
    },
    before,
  );
  return lab;
}

test("a link that goes down hangs up on a guest that sees it by nothing else, and keeps its process away until it is up", () => {
  using lab = make();
  const { link } = lab;
  lab.see(UP);
  expect([link.trouble, link.welcomes(PID), lab.closed]).toEqual([undefined, true, []]);
  lab.see(DOWN);
  lab.see(DOWN);
  expect(lab.closed).toHaveLength(1);
  expect([link.welcomes(PID), link.welcomes(PID + 1)]).toEqual([false, true]);
  expect(link.trouble).toContain("process 77");
  lab.see(UP);
  expect([link.welcomes(PID), link.trouble]).toEqual([true, undefined]);
  expect(lab.troubles).toEqual([expect.stringContaining("turned away"), undefined]);
});

const stays: [string, { hearsOfChanges?: boolean; managed?: boolean }, string][] = [
  ["that is told of changes", { hearsOfChanges: true }, "sees it"],
  ["that could not go on later", { managed: false }, "does not see it"],
];
for (const [what, options, said] of stays) {
  test(`a guest ${what} stays connected`, () => {
    using lab = make({ config: UP }, options);
    lab.see(UP);
    lab.see(DOWN);
    expect([lab.closed, lab.link.welcomes(PID)]).toEqual([[], true]);
    expect(lab.link.trouble).toBe(`the link is down: its guest ${said}`);
  });
}

test("a guest that starts while the link is down is only told of: another VM is served on it", () => {
  using lab = make({ config: DOWN });
  lab.see(DOWN);
  expect(lab.closed).toEqual([]);
  expect(lab.link.trouble).toBe("the link is down: its guest does not see it");
  lab.running = false;
  expect(lab.link.trouble).toBe("the link is down");
  lab.see(UP);
  lab.see(DOWN);
  expect([lab.closed, lab.link.trouble]).toEqual([[], "the link is down"]);
  // What was up before it ran was not shown to it.
  lab.running = true;
  lab.see(DOWN);
  expect(lab.closed).toEqual([]);
});

test("a guest that has run with the link up and goes on while it is down is hung up on; one of a later session is not", () => {
  using lab = make();
  const { link } = lab;
  const goOn = () => {
    lab.running = false;
    lab.see(DOWN);
    expect([lab.closed, link.welcomes(PID)]).toEqual([[], true]);
    lab.running = true;
    lab.see(DOWN);
  };
  lab.see(UP);
  link.forget();
  goOn();
  expect(lab.closed).toEqual([]);
  lab.see(UP);
  goOn();
  expect([lab.closed.length, link.welcomes(PID)]).toEqual([1, false]);
});

test("a link that is up again at a second look hangs up on nobody", async () => {
  using lab = make();
  lab.see(UP);
  for (let times = 0; times < 2; times++) {
    lab.link.seen(DOWN);
    await lab.link.look();
  }
  expect([lab.closed, lab.troubles, lab.link.trouble]).toEqual([[], [], undefined]);
  expect(lab.looks).toBeGreaterThanOrEqual(2);
});

test("a record goes on where the link was: what changed meanwhile is a change", async () => {
  using before = make();
  using away = make();
  for (const lab of [before, away]) lab.see(UP);
  away.see(DOWN);
  expect([before.noted, away.noted]).toEqual([1, 2]);
  using later = make({ record: structuredClone(away.link.snapshot()) });
  expect(later.link.welcomes(PID)).toBe(false);
  await later.link.look();
  expect(later.link.welcomes(PID)).toBe(true);
  using missed = make({ record: structuredClone(before.link.snapshot()) });
  missed.config = DOWN;
  await missed.link.look();
  expect(missed.closed).toHaveLength(1);
  const good = { up: true, shown: false, away: null };
  for (const record of [null, {}, { ...good, up: 1 }, { ...good, shown: undefined }, { ...good, away: "77" }]) {
    expect(() => make({ record })).toThrow("the record of a VF's link");
  }
});

test("while it is down it is asked, also after a question that failed, until nobody cares", async () => {
  using lab = make({ config: DOWN }, { hearsOfChanges: true });
  const asked = Promise.withResolvers<void>();
  lab.changed = asked.resolve;
  lab.failures = 2;
  await asked.promise;
  expect(lab.link.trouble).toBeUndefined();
  lab.see(DOWN);
  lab.link[Symbol.dispose]();
  lab.see(UP);
  await lab.link.look();
  expect(lab.link.trouble).toContain("down");
});

test("a class that knows no link is always up, and never asked", async () => {
  using lab = make({ config: DOWN }, { linkUp: false });
  lab.config = DOWN;
  await lab.link.look();
  lab.see(DOWN);
  expect([lab.link.trouble, lab.closed]).toEqual([undefined, []]);
});
