import { describe, expect, test } from "bun:test";
import { encodeMessage, PROTOCOL_VERSION, ProtocolFeature, Request } from "../../../src/vhost-user/messages.ts";
import { FeatureBit, featureBits } from "../../../src/virtio/features.ts";
import { FrontendDirtyLog } from "../../kit/frontend/dirty-log.ts";
import { FrontendMemory } from "../../kit/frontend/memory.ts";
import { presetup, setLogBase, startLogging, stopLogging } from "../../kit/frontend/migration-messages.ts";
import { fdsLeftBy, REGIONS } from "./harness.ts";
import { type HostOptions, KillableHost } from "./killable-host.ts";

/** A test runs the session once for each event. Milliseconds. */
const TIMEOUT = 60_000;

interface Script {
  readonly what: string;
  readonly options?: HostOptions;
  play(host: KillableHost): Promise<void>;
}

const withoutSlots = ~featureBits(ProtocolFeature.CONFIGURE_MEM_SLOTS);
const withoutStatus = ~featureBits(ProtocolFeature.STATUS);

const SCRIPTS: readonly Script[] = [
  {
    what: "a start, a stop in the old order, a start and a reset",
    options: { config: new Uint8Array(13) },
    async play({ frontend }) {
      await frontend.negotiate();
      await frontend.setupMemory(REGIONS.slice(2));
      await frontend.startQueues(1, { size: 64 });
      frontend.queues[0]!.driver.ring.submit([new Uint8Array(1)], []);
      await frontend.setConfig(12, Uint8Array.of(7));
      await frontend.getConfig(0, 13);
      await frontend.resumeQueues(await frontend.stop({ order: "old" }));
      await frontend.command(Request.RESET_DEVICE);
    },
  },
  {
    what: "a start and a stop in the new order, few replies",
    async play({ frontend }) {
      frontend.replies = "as QEMU";
      await frontend.negotiate();
      await frontend.setupMemory(REGIONS.slice(2));
      await frontend.startQueues(2, { size: 64 });
      await frontend.stop({ order: "new" });
      await frontend.setStatus(0);
      await frontend.askU64(Request.GET_STATUS);
    },
  },
  {
    what: "a start without a status",
    options: { quietPeriod: 1 },
    async play({ frontend, target }) {
      await frontend.negotiate({ protocolFeatures: withoutStatus });
      await frontend.setupMemory(REGIONS.slice(2));
      await frontend.startQueues(1, { size: 64 });
      while (target.running === undefined) await Bun.sleep(1);
      await frontend.getBase(0);
    },
  },
  {
    what: "memory that comes and goes by slots, said for each pair",
    async play({ frontend }) {
      await frontend.negotiate();
      await frontend.setupMemory(REGIONS);
      await frontend.startQueues(1, { size: 64 });
      const [low, middle] = frontend.memory.regions;
      for (const region of [low!, middle!, low!, middle!]) await frontend.removeRegion(region);
      for (const region of [low!, middle!, low!, middle!]) await frontend.addRegion(region);
    },
  },
  {
    what: "memory as a table",
    async play({ frontend }) {
      await frontend.negotiate({ protocolFeatures: withoutSlots });
      await frontend.setupMemory(REGIONS);
      const [low, middle, high] = frontend.memory.regions;
      await frontend.setMemTable([low!, high!]);
      await frontend.setMemTable([middle!, high!]);
    },
  },
  {
    what: "other memory in the place of what was there, between a stop and a start",
    async play({ frontend }) {
      await frontend.negotiate({ protocolFeatures: withoutSlots });
      await frontend.setupMemory(REGIONS);
      await frontend.startQueues(1, { size: 64 });
      const bases = await frontend.stop({ order: "new" });
      using other = new FrontendMemory(REGIONS.slice(0, 1));
      await frontend.setMemTable([...other.regions, ...frontend.memory.regions.slice(1)]);
      await frontend.resumeQueues(bases);
    },
  },
  {
    what: "rings that are enabled and disabled while the device runs",
    async play({ frontend }) {
      await frontend.negotiate();
      await frontend.setupMemory(REGIONS.slice(2));
      frontend.enableAll = async () => void (await frontend.enable(0, true));
      await frontend.startQueues(2, { size: 64 });
      await frontend.enable(1, true);
      await frontend.enable(1, false);
      await frontend.command(Request.RESET_OWNER);
    },
  },
  {
    what: "a migration",
    options: { dirtyTracking: true },
    async play({ frontend }) {
      using log = new FrontendDirtyLog(REGIONS[2]!.gpa + REGIONS[2]!.size);
      await frontend.negotiate();
      await frontend.setupMemory(REGIONS.slice(2));
      await frontend.startQueues(1, { size: 64 });
      await startLogging(frontend, log);
      await frontend.askU64(Request.GET_FEATURES);
      await stopLogging(frontend);
      await startLogging(frontend, log);
      await frontend.getBase(0);
    },
  },
  {
    what: "a device that has run before there was a log",
    options: { dirtyTracking: true, quietPeriod: 1 },
    async play({ frontend, target, answers }) {
      using log = new FrontendDirtyLog(REGIONS[2]!.gpa + REGIONS[2]!.size);
      await frontend.negotiate({ protocolFeatures: withoutStatus });
      frontend.features |= featureBits(FeatureBit.vhostLogAll);
      await frontend.setupMemory(REGIONS.slice(2));
      await frontend.startQueues(1, { size: 64 });
      while (target.running === undefined) await Bun.sleep(1);
      await frontend.getBase(0);
      await setLogBase(frontend, log);
      answers.push(`${log.look().length} pages`);
    },
  },
  {
    what: "an early set-up",
    options: { presetup: true },
    async play({ frontend }) {
      await frontend.negotiate();
      await frontend.setupMemory(REGIONS.slice(2));
      await frontend.startQueues(1, { size: 64 });
      const bases = await frontend.stop({ order: "new" });
      await presetup(frontend, frontend.queues, { bases });
      await frontend.resumeQueues(bases);
    },
  },
];

/** Plays it, and says how it went. */
async function play(script: Script, options: HostOptions = {}) {
  await using host = new KillableHost({ whileAnswering: false, ...script.options, ...options });
  const failed = host.ended.promise.then(({ reason, error }) => {
    throw new Error(`the session ended: ${error?.stack ?? reason}`);
  });
  await Promise.race([script.play(host), failed]);
  failed.catch(() => {});
  // Answered when all messages before it are done with.
  await host.frontend.askU64(Request.GET_FEATURES);
  const barrier = host.events.findLastIndex((event) => !event.startsWith(`${Request.GET_FEATURES}: `));
  const events = host.events.slice(0, barrier + 1);
  return { events, deaths: host.deaths, seen: { answers: host.answers, ...host.outcome } };
}

describe("a process that is killed and started again, whenever that is, is not noticed", () => {
  for (const script of SCRIPTS) {
    test(
      script.what,
      async () => {
        const left = await fdsLeftBy(async () => {
          const { events, seen } = await play(script);
          // The first record is the begin.
          for (let at = 2; at < events.length; at++) {
            for (const killAt of at % 4 === 0 ? [[at], [at, at + 1]] : [[at]]) {
              const run = await play(script, { killAt });
              expect(run.deaths, events[at]).toBeGreaterThan(0);
              expect(run.seen, `killed at ${at}, ${events[at]}`).toEqual(seen);
            }
          }
        });
        expect(left).toBe(0);
      },
      TIMEOUT,
    );
  }
});

describe("a process that is killed while it answers", () => {
  const script = SCRIPTS[0]!;

  test(
    "ends the session, whose front-end connects anew",
    async () => {
      const left = await fdsLeftBy(async () => {
        const { events } = await play(script, { whileAnswering: true });
        for (let at = 0; at < events.length; at++) {
          await using host = new KillableHost({ ...script.options, whileAnswering: true, killAt: [at] });
          const played = script.play(host).catch(() => {});
          const { error } = await host.ended.promise;
          expect(error?.message, events[at]).toContain("the daemon was killed while it answered ");
          await played;
          expect(host.target.mapped).toEqual([]);
          expect(host.target.calls.at(-1)).toMatch(/^release|^unmap/);
        }
      });
      expect(left).toBe(0);
    },
    TIMEOUT,
  );

  test("is not noticed where the message was finished and another one is there", async () => {
    await using host = new KillableHost({ killAt: [4], whileAnswering: false });
    await host.frontend.askU64(Request.GET_FEATURES);
    await host.frontend.askU64(Request.GET_PROTOCOL_FEATURES);
    expect(host.deaths).toBe(1);
    expect(host.events.slice(2, 6)).toEqual(["1: came", "1: to be replied to", "1: finished", "15: came"]);
  });

  test("freezes a function that marks what it writes, and marks all, before the session ends", async () => {
    const [, , region] = REGIONS;
    using log = new FrontendDirtyLog(region!.gpa + region!.size);
    await using host = new KillableHost({ dirtyTracking: true, whileAnswering: true });
    const { frontend, target } = host;
    await frontend.negotiate();
    await frontend.setupMemory([region!]);
    await frontend.startQueues(1, { size: 64 });
    await startLogging(frontend, log);
    log.take();
    host.killNext();
    const asked = frontend.askU64(Request.GET_STATUS).catch(() => {});
    while (log.look().length < region!.size / 4096) await Bun.sleep(1);
    expect(target.running).toBeUndefined();
    expect(target.calls.at(-1)).toBe("stop");
    log.take();
    const { error } = await host.ended.promise;
    await asked;
    expect(error?.message).toContain("the daemon was killed while it answered GET_STATUS");
  });

  test("or handles a message that came in pieces ends the session", async () => {
    await using host = new KillableHost({ killAt: [2] });
    const bytes = encodeMessage(Request.GET_FEATURES, PROTOCOL_VERSION, new Uint8Array(8));
    await host.frontend.channel.sendRaw(bytes.subarray(0, 15));
    await Bun.sleep(5);
    await host.frontend.channel.sendRaw(bytes.subarray(15));
    const { error } = await host.ended.promise;
    expect(error?.message).toContain("while it handled a message that had come in pieces");
  });
});
