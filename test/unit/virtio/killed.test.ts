import { describe, expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import type { DeviceClass } from "../../../src/plugin.ts";
import { withEnabled } from "../../../src/virtio/device-state.ts";
import { KillLab } from "./kill-lab.ts";
import { cleanUpAfterEach, disposeAll } from "./vendor-lab.ts";

cleanUpAfterEach();

const soon = () => Deadline.after(3000, "the test");

/** One operation, and what is done before. */
interface Scenario {
  readonly make: () => Promise<KillLab>;
  readonly before?: (lab: KillLab) => Promise<unknown>;
  readonly act: (lab: KillLab) => Promise<unknown>;
  /** What comes next, after its record was written. */
  readonly next?: (lab: KillLab) => Promise<unknown>;
}

const start = (lab: KillLab) => lab.path.start(lab.wanted(), lab.eventfds, soon(), lab.checkpoint);
const stop = (lab: KillLab) => lab.path.stop(lab.rings, "drained", soon());
const enable = (lab: KillLab, ...queues: number[]) => lab.path.enable(new Set(queues), lab.eventfds, lab.rings, soon());
const prepare = (lab: KillLab) => lab.path.prepare(lab.wanted(), soon());
const startWith = (lab: KillLab, ...queues: number[]) =>
  lab.path.start(withEnabled(lab.wanted(), new Set(queues)), lab.eventfds, soon(), lab.checkpoint);
/** With a driver that has begun anew. */
const moved = async (lab: KillLab, index: number) => lab.beginAt(index);

const accepted = () => true;
const control: NonNullable<DeviceClass["control"]> = {
  queue: () => 2,
  features: [],
  commands: ({ queues }) => [{ name: "USE", request: Uint8Array.from(queues), answerSize: 1, accepted }],
};
const receives = (queue: number) => queue === 0;

const vendor: Readonly<Record<string, Scenario>> = {
  "a start": { make: KillLab.vendor, before: (lab) => moved(lab, 5), act: start },
  "a start of one that stands by": { make: KillLab.vendor, before: (lab) => lab.path.standBy(soon()), act: start },
  "a start of one that was prepared": {
    make: KillLab.vendor,
    before: (lab) => lab.path.prepare(lab.wanted(), soon()),
    act: start,
  },
  "a start where it stands": {
    make: KillLab.vendor,
    before: async (lab) => {
      await start(lab);
      lab.work();
      await stop(lab);
    },
    act: start,
  },
  "a start elsewhere": {
    make: KillLab.vendor,
    before: async (lab) => {
      await start(lab);
      await stop(lab);
      await moved(lab, 900);
    },
    act: start,
  },
  "an early set-up": { make: KillLab.vendor, act: prepare, next: start },
  "an early set-up of one that was stopped": {
    make: KillLab.vendor,
    before: async (lab) => {
      await start(lab);
      lab.work();
      await stop(lab);
    },
    act: prepare,
    next: start,
  },
  "a stop": { make: KillLab.vendor, before: start, act: stop },
  "a queue that is disabled": {
    make: KillLab.vendor,
    before: async (lab) => {
      await start(lab);
      lab.keep(0, [4, 1]);
    },
    act: (lab) => enable(lab, 0),
    next: (lab) => enable(lab, 0, 1),
  },
  "a queue that is enabled": {
    make: KillLab.vendor,
    before: async (lab) => {
      await startWith(lab, 0);
      lab.keep(0, [7]);
    },
    act: (lab) => enable(lab, 0, 1),
  },
  "a queue that is disabled beside one that receives": {
    make: () => KillLab.vendor({ receives }),
    before: start,
    act: (lab) => enable(lab, 0),
  },
  "a reset of one that runs": { make: KillLab.vendor, before: start, act: (lab) => lab.path.reset(soon()) },
  "a reset of one that stands": {
    make: KillLab.vendor,
    before: async (lab) => {
      await start(lab);
      await stop(lab);
    },
    act: (lab) => lab.path.reset(soon()),
  },
};

const registers: Readonly<Record<string, Scenario>> = {
  "a start": { make: KillLab.registers, act: start },
  "a start where it stands": {
    make: KillLab.registers,
    before: async (lab) => {
      await start(lab);
      lab.work();
      await stop(lab);
    },
    act: start,
  },
  "a start where one stands that is kept from memory": {
    make: () => KillLab.registers({ receives }),
    before: async (lab) => {
      await start(lab);
      lab.work();
      await stop(lab);
    },
    act: start,
  },
  "a start with a queue of its own": { make: () => KillLab.registers({ control }), act: start },
  "a stop": { make: KillLab.registers, before: start, act: stop },
  "a stop of one that receives": { make: () => KillLab.registers({ receives }), before: start, act: stop },
  "a queue that is disabled": {
    make: () => KillLab.registers({ control }),
    before: start,
    act: (lab) => enable(lab, 0),
  },
  "a queue that is enabled": {
    make: () => KillLab.registers({ control }),
    before: (lab) => startWith(lab, 0),
    act: (lab) => enable(lab, 0, 1),
  },
  "a reset": { make: KillLab.registers, before: start, act: (lab) => lab.path.reset(soon()) },
};

async function begin({ make, before }: Scenario): Promise<KillLab> {
  const lab = await make();
  await before?.(lab);
  lab.work();
  await lab.checkpoint();
  return lab;
}

async function finish({ next }: Scenario, lab: KillLab): Promise<void> {
  await lab.checkpoint();
  await next?.(lab);
}

async function undisturbed(scenario: Scenario) {
  const lab = await begin(scenario);
  const { accesses } = lab.life;
  const { resets } = lab;
  await scenario.act(lab);
  const actAccesses = lab.life.accesses - accesses;
  await finish(scenario, lab);
  const result = { outcome: lab.outcome, accesses: actAccesses, resets: lab.resets - resets };
  await disposeAll();
  return result;
}

/** Of a function that waits on kicks itself. */
const direct: Readonly<Record<string, Scenario>> = {
  "a start": { make: KillLab.direct, act: start },
  "a stop": { make: KillLab.direct, before: start, act: stop },
  "a queue that is disabled": { make: KillLab.direct, before: start, act: (lab) => enable(lab, 0) },
  "a queue that is enabled": {
    make: KillLab.direct,
    before: (lab) => startWith(lab, 0),
    act: (lab) => enable(lab, 0, 1),
  },
};

for (const [kind, scenarios] of Object.entries({ vendor, registers, direct })) {
  describe(kind, () => {
    test.each(Object.entries(scenarios))("a kill in the middle of %s is noticed by nobody", async (_, scenario) => {
      const { outcome, accesses } = await undisturbed(scenario);
      expect(accesses).toBeGreaterThan(1);
      for (let killed = 1; killed <= accesses; killed++) {
        const lab = await begin(scenario);
        lab.life.endsAfter(killed);
        const acting = scenario.act(lab);
        acting.catch(() => {});
        await Promise.race([lab.life.died.promise, acting]);
        const { mayRun, resets } = lab;
        await lab.succeed();
        const at = `killed after ${killed} of ${accesses} accesses${mayRun ? ", running" : ""}`;
        await scenario.act(lab).catch((cause) => {
          throw new Error(at, { cause });
        });
        await finish(scenario, lab);
        // What it had taken would be lost.
        if (mayRun && outcome.kind !== "reset") expect({ at, resets: lab.resets }).toEqual({ at, resets });
        expect({ at, ...lab.outcome }).toEqual({ at, ...outcome });
        if (outcome.kind !== "reset") expect({ at, indices: lab.indices }).toEqual({ at, indices: lab.done });
        await disposeAll();
      }
    });

    test.each(Object.entries(scenarios))("%s that was done is done again", async (_, scenario) => {
      const { outcome } = await undisturbed(scenario);
      for (const isNoted of [false, true]) {
        const lab = await begin(scenario);
        await scenario.act(lab);
        if (isNoted) await lab.checkpoint();
        lab.work();
        const { mayRun, resets } = lab;
        await lab.succeed();
        await scenario.act(lab);
        await finish(scenario, lab);
        expect(lab.outcome).toEqual(outcome);
        if (mayRun && outcome.kind !== "reset") expect(lab.resets).toBe(resets);
        if (outcome.kind !== "reset") expect(lab.indices).toEqual(lab.done);
        await disposeAll();
      }
    });
  });
}
