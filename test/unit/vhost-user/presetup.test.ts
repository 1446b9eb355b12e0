import { describe, expect, test } from "bun:test";
import { VhostdError } from "../../../src/base/errors.ts";
import { silentLogger } from "../../../src/base/log.ts";
import { memfd } from "../../../src/native/sys.ts";
import { ProtocolFeature, Request } from "../../../src/vhost-user/messages.ts";
import { Session } from "../../../src/vhost-user/session.ts";
import { Status } from "../../../src/virtio/features.ts";
import { u64, type VhostUserFrontend } from "../../kit/frontend/frontend.ts";
import { Migration } from "../../kit/frontend/migration.ts";
import { presetup } from "../../kit/frontend/migration-messages.ts";
import { MockTarget } from "../../kit/mock-target.ts";
import { copySession } from "./copy-session.ts";
import { connect, connectUncounted, fdsLeftBy, type Pair, REGIONS, startRunning } from "./harness.ts";

const MAPPED = ["map 0x0+0xa0000", "map 0xc0000+0x100000", "map 0x100000000+0x800000"];
const SHORT = 5;

/** A VM with two rings that has been served a while, and a destination that it moves to. */
async function migrating(
  options: Parameters<typeof connect>[0],
  body: (migration: Migration, destination: Pair, source: Pair) => Promise<void>,
): Promise<void> {
  const left = await fdsLeftBy(async () => {
    await using source = connectUncounted({ dirtyTracking: true });
    await using destination = connectUncounted({ presetup: true, ...options });
    await startRunning(source.frontend, 2);
    for (let n = 0; n < 5; n++) source.frontend.queues[1]!.driver.ring.submit([new Uint8Array(1)], []);
    await destination.frontend.negotiate();
    using migration = await Migration.begin([source.frontend]);
    await body(migration, destination, source);
  });
  expect(left).toBe(0);
}

describe("a device is set up before its VM has arrived", () => {
  test("it is prepared, does not run, and the start is a normal one with the final indices", async () => {
    await migrating({ quietPeriod: SHORT }, async (migration, destination, source) => {
      const { frontend, target } = destination;
      await migration.prepare([frontend], { bases: [0, 2] });
      expect(target.calls).toEqual([...MAPPED, "prepare 0@0 1@2"]);
      expect(target.prepared?.queues[1]).toMatchObject({ size: 64, vector: 2, lastAvail: 2, lastUsed: 2 });
      expect(target.prepared?.queues.some(({ disabled }) => disabled)).toBe(false);
      await Bun.sleep(5 * SHORT);
      expect(target.running).toBeUndefined();
      expect(destination.session.status).toMatchObject({ state: "negotiated" });
      expect(destination.session.status.rings.map(({ started }) => started)).toEqual([false, false]);

      source.frontend.queues[0]!.driver.ring.submit([new Uint8Array(1)], []);
      await migration.stop({ order: "old" });
      migration.pass();
      expect(migration.bases).toEqual([[1, 5]]);
      expect(migration.differences()).toEqual([]);
      await migration.arrive([frontend]);
      expect(target.calls.slice(4)).toEqual(["start 0@1 1@5"]);
      expect(target.eventfds.get(1)?.kick).toBeNumber();
    });
  });

  test("a device that does not take it early is started all the same", async () => {
    await migrating({}, async (migration, { frontend, target, lines }) => {
      target.before = (operation) => {
        if (operation === "prepare") throw new VhostdError("stateSave", "no room for a state");
      };
      await migration.prepare([frontend]);
      expect(lines.at(-1)).toContain("the device could not be set up early");
      await migration.stop({ order: "new" });
      migration.pass();
      await migration.arrive([frontend]);
      expect(target.running?.queues).toHaveLength(2);
    });
  });

  test("a ring that lacks something is no error either, nor is an early set-up of nothing", async () => {
    await using pair = connect({ presetup: true });
    const { frontend, target, lines } = pair;
    await frontend.negotiate();
    await frontend.command(Request.PRESETUP, u64(1n));
    expect(await frontend.command(Request.PRESETUP, u64(2n))).toBe(0n);
    await frontend.command(Request.PRESETUP, u64(1n));
    await frontend.command(Request.SET_VRING_KICK, u64(0x100n));
    expect(await frontend.command(Request.PRESETUP, u64(2n))).toBe(0n);
    expect(lines.at(-1)).toContain("could not be set up early");
    expect(target.calls).toEqual([]);
  });

  test("DRIVER_OK in the middle starts nothing, a ring that is asked for its index is left out", async () => {
    await migrating({ quietPeriod: SHORT }, async (migration, { frontend, target }) => {
      const command = frontend.command.bind(frontend);
      frontend.command = async (request, payload, fds) => {
        if (request !== Request.PRESETUP || payload?.[0] !== 2) return await command(request, payload, fds);
        await frontend.setStatus(0xf);
        await Bun.sleep(5 * SHORT);
        expect(await frontend.getBase(0)).toBe(0);
        return await command(request, payload, fds);
      };
      await migration.prepare([frontend]);
      expect(target.calls).toEqual([...MAPPED, "prepare 1@0"]);
    });
  });

  test("a stopped device can be set up again", async () => {
    await using pair = connect({ presetup: true });
    const { frontend, target } = pair;
    await startRunning(frontend, 2);
    await frontend.stop({ order: "new" });
    await presetup(frontend, frontend.queues);
    expect(target.calls.at(-1)).toBe("prepare 0@0 1@0");
    await frontend.resumeQueues([0, 0]);
    expect(target.calls.at(-1)).toBe("start 0@0 1@0");
  });

  test("so can one that was given up by status 0", async () => {
    await using pair = connect({ presetup: true });
    const { frontend, target } = pair;
    await startRunning(frontend, 1);
    await frontend.setStatus(0);
    await presetup(frontend, frontend.queues);
    expect(target.calls.slice(-2)).toEqual(["reset", "prepare 0@0"]);
  });

  test("a front-end that hangs up in the middle leaves nothing", async () => {
    await using pair = connect({ presetup: true });
    const { frontend, target } = pair;
    await frontend.negotiate();
    await frontend.command(Request.PRESETUP, u64(1n));
    await frontend.setupMemory(REGIONS);
    frontend.channel[Symbol.dispose]();
    expect((await pair.ended).reason).toContain("closed the connection");
    expect(target.mapped).toEqual([]);
  });
});

test("the next process goes on with an early set-up", async () => {
  await using pair = connect({ presetup: true });
  const { frontend, session } = pair;
  await frontend.negotiate();
  await frontend.command(Request.PRESETUP, u64(1n));
  await frontend.setFeatures();
  await frontend.command(Request.SET_STATUS, u64(0x108n));
  const { data, fds } = copySession(session);
  const revived = Session.revive(new MockTarget({ presetup: true }), data, fds, { log: silentLogger });
  expect(revived.status).toMatchObject({ state: "preparing", features: frontend.features, status: 8 });
  const ended = revived.run();
  revived.close("the test is over");
  await ended;
});

describe("out of turn it ends the session", () => {
  const early = (value: bigint) => (frontend: VhostUserFrontend) => frontend.command(Request.PRESETUP, u64(value));
  const cases: Record<string, [send: (frontend: VhostUserFrontend) => Promise<unknown>, reason: string]> = {
    "another value": [early(3n), "early set-up is 3, must be 1 or 2"],
    "an end without a begin": [early(2n), "prepared is not possible while negotiated"],
    "a second begin": [
      async (frontend) => {
        await early(1n)(frontend);
        await early(1n)(frontend);
      },
      "prepare is not possible while preparing",
    ],
    "an end after a reset": [
      async (frontend) => {
        await early(1n)(frontend);
        await frontend.command(Request.RESET_DEVICE);
        await early(2n)(frontend);
      },
      "prepared is not possible while negotiated",
    ],
    "a begin on a running device": [
      async (frontend) => {
        await frontend.setupMemory(REGIONS);
        await frontend.startQueues(1, { size: 64 });
        await early(1n)(frontend);
      },
      "prepare is not possible while running",
    ],
  };
  for (const [what, [send, reason]] of Object.entries(cases)) {
    test(what, async () => {
      await using pair = connect({ presetup: true });
      await pair.frontend.negotiate();
      await pair.frontend.setFeatures();
      await send(pair.frontend).catch(() => {});
      expect((await pair.ended).reason).toBe(reason);
    });
  }

  test("and where the operator has not said that the front-end has it", async () => {
    await using pair = connect();
    await pair.frontend.negotiate();
    expect(pair.frontend.has(ProtocolFeature.PRESETUP)).toBe(false);
    await pair.frontend.command(Request.PRESETUP, u64(1n)).catch(() => {});
    expect((await pair.ended).reason).toContain("PRESETUP (41) needs protocol feature PRESETUP (18)");
  });
});

describe("a status that is wider than a byte", () => {
  test("0x100 asks for the doorbell of queue 0 only, and is not read back", async () => {
    using doorbell = memfd("doorbell", 4096);
    const doorbellShare = async () => ({ fd: doorbell.number, offset: 0, size: 4096 });
    await using pair = connect({ presetup: true, doorbellShare });
    const { frontend, target } = pair;
    await frontend.negotiate();
    await frontend.setupMemory(REGIONS);
    const setStatus = frontend.setStatus.bind(frontend);
    frontend.setStatus = async (bits) => {
      if (bits === Status.featuresOk) await setStatus(bits);
      else await frontend.command(Request.SET_STATUS, u64(0x10fn));
    };
    await frontend.startQueues(3, { size: 64 });
    expect(target.running?.queues).toHaveLength(3);
    expect(await frontend.askU64(Request.GET_STATUS)).toBe(0xfn);
    await frontend.backendRequests!.wait(1);
    // The back-end's next word comes after all doorbells.
    target.changeConfig(Uint8Array.of(1));
    await frontend.backendRequests!.wait(2);
    expect(frontend.backendRequests!.received.map(({ request }) => request)).toEqual([3, 2]);
    expect(frontend.backendRequests!.received[0]!.payload[0]).toBe(0);
    await frontend.command(Request.SET_STATUS, u64(0x100n));
    expect(await frontend.askU64(Request.GET_STATUS)).toBe(0n);
    expect(await frontend.getBase(0)).toBe(0);
    expect(target.calls.at(-1)).toBe("stop");
  });

  for (const status of [0x200n, 0x8fn | 0x1_0000_0000n, 2n ** 63n]) {
    test(`0x${status.toString(16)} is refused`, async () => {
      await using pair = connect({ presetup: true });
      await pair.frontend.negotiate();
      await pair.frontend.command(Request.SET_STATUS, u64(status)).catch(() => {});
      expect((await pair.ended).reason).toContain("exceeds 0x1ff");
    });
  }
});
