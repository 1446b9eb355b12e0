import { describe, expect, test } from "bun:test";
import { VhostdError } from "../../../src/base/errors.ts";
import { silentLogger } from "../../../src/base/log.ts";
import { ConfigAhead } from "../../../src/vhost-user/config-ahead.ts";
import { Request } from "../../../src/vhost-user/messages.ts";
import { Session } from "../../../src/vhost-user/session.ts";
import { presetup } from "../../kit/frontend/migration-messages.ts";
import { MockTarget } from "../../kit/mock-target.ts";
import { rejection } from "../../kit/rejection.ts";
import { copySession } from "./copy-session.ts";
import { connect, LONG_QUIET, REGIONS, startRunning } from "./harness.ts";

/** Milliseconds: old enough to be read again, and not quite. */
const OLD = 100;
const YOUNG = 99;

describe("what is read ahead", () => {
  /** A function whose configuration space is the number of the read, and a clock. */
  function make() {
    const clock = { time: 1000 };
    const target = {
      reads: 0,
      failure: undefined as Error | undefined,
      async readConfig() {
        this.reads++;
        if (this.failure !== undefined) throw this.failure;
        return Uint8Array.of(this.reads);
      },
    };
    return { clock, target, ahead: new ConfigAhead(target, () => clock.time) };
  }

  test("is read when it is asked for, once, and taken without another read", async () => {
    const { clock, target, ahead } = make();
    ahead.ask();
    expect(target.reads).toBe(1);
    clock.time += YOUNG;
    ahead.ask();
    expect(await ahead.take()).toEqual(Uint8Array.of(1));
    expect(target.reads).toBe(1);
  });

  test("is read when it is taken, where nobody asked", async () => {
    const { target, ahead } = make();
    expect(await ahead.take()).toEqual(Uint8Array.of(1));
    expect(target.reads).toBe(1);
  });

  test("is taken once", async () => {
    const { ahead } = make();
    ahead.ask();
    await ahead.take();
    expect(await ahead.take()).toEqual(Uint8Array.of(2));
  });

  test("is read again where it is too old, when it is taken and when it is asked for", async () => {
    const { clock, target, ahead } = make();
    ahead.ask();
    clock.time += OLD;
    expect(await ahead.take()).toEqual(Uint8Array.of(2));
    ahead.ask();
    clock.time += OLD;
    ahead.ask();
    clock.time += YOUNG;
    expect(await ahead.take()).toEqual(Uint8Array.of(4));
    expect(target.reads).toBe(4);
  });

  test("is forgotten, also while it is being read", async () => {
    const { ahead } = make();
    ahead.ask();
    ahead.forget();
    expect(await ahead.take()).toEqual(Uint8Array.of(2));
    ahead.ask();
    await Bun.sleep(0);
    ahead.forget();
    ahead.ask();
    expect(await ahead.take()).toEqual(Uint8Array.of(4));
  });

  test("and could not be read, is read again for whoever takes it, and is no error for anybody else", async () => {
    const { clock, target, ahead } = make();
    const unhandled: unknown[] = [];
    const note = (error: unknown) => void unhandled.push(error);
    process.on("unhandledRejection", note);
    try {
      target.failure = new VhostdError("again", "it changes all the time");
      ahead.ask();
      await Bun.sleep(1);
      clock.time += YOUNG;
      expect(await rejection(ahead.take())).toBe(target.failure);
      expect(target.reads).toBe(2);
      ahead.ask();
      ahead.forget();
      ahead.ask();
      clock.time += OLD;
      await Bun.sleep(1);
      target.failure = undefined;
      expect(await ahead.take()).toEqual(Uint8Array.of(5));
      await Bun.sleep(1);
      expect(unhandled).toEqual([]);
    } finally {
      process.off("unhandledRejection", note);
    }
  });
});

describe("in a session", () => {
  /** A front-end that has said its features, and what is read of the function from then on. */
  async function negotiated(options: Parameters<typeof connect>[0] = {}) {
    const pair = connect(options);
    const reads: number[] = [];
    pair.target.before = (operation) => {
      if (operation !== "readConfig") return;
      pair.target.config = pair.target.config.with(0, 100 + reads.length);
      reads.push(pair.target.calls.length);
    };
    await pair.frontend.negotiate();
    await pair.frontend.setupMemory(REGIONS);
    expect(reads).toEqual([]);
    await pair.frontend.setFeatures();
    return { ...pair, reads };
  }

  test("the features have it read, and a start has it", async () => {
    await using pair = await negotiated();
    expect(pair.reads.length).toBe(1);
    // Read once more by a start, where this machine is slow.
    await pair.frontend.startQueues(1, { size: 64 });
    expect(pair.target.running?.config).toEqual(pair.target.config);
  });

  test("features that are said while it runs have nothing read", async () => {
    await using pair = await negotiated();
    await pair.frontend.startQueues(1, { size: 64 });
    const before = pair.reads.length;
    await pair.frontend.setFeatures();
    expect(pair.reads.length).toBe(before);
  });

  test("SET_CONFIG between the features and the start is in what it is started with", async () => {
    await using pair = await negotiated();
    const { frontend, target } = pair;
    const setStatus = frontend.setStatus.bind(frontend);
    frontend.setStatus = async (bits) => {
      if (bits === 0xf) {
        target.before = (operation) => {
          if (operation === "writeConfig") target.config = target.config.with(1, 0xee);
        };
        expect(await frontend.setConfig(12, Uint8Array.of(7))).toBe(0n);
      }
      await setStatus(bits);
    };
    await frontend.startQueues(1, { size: 64 });
    expect(target.calls).toContain("writeConfig 12 07");
    expect(target.running?.config[1]).toBe(0xee);
  });

  test("so is a change of the device's own", async () => {
    await using pair = await negotiated();
    const { frontend, target } = pair;
    const setStatus = frontend.setStatus.bind(frontend);
    frontend.setStatus = async (bits) => {
      if (bits === 0xf) {
        target.before = () => {};
        target.changeConfig(Uint8Array.of(50, 51));
      }
      await setStatus(bits);
    };
    await frontend.startQueues(1, { size: 64 });
    expect(target.running?.config).toEqual(Uint8Array.of(50, 51));
  });

  test("RESET_DEVICE has it read again", async () => {
    await using pair = await negotiated();
    const { frontend, target, reads } = pair;
    await frontend.command(Request.RESET_DEVICE);
    target.before = () => {};
    target.config = Uint8Array.of(60);
    // The features stay, and nothing else has it read before the start.
    frontend.setFeatures = async () => 0n;
    await frontend.startQueues(1, { size: 64 });
    expect(reads.length).toBe(1);
    expect(target.running?.config).toEqual(Uint8Array.of(60));
  });

  test("an early set-up has it, and the start behind it has what it is then", async () => {
    await using pair = await negotiated({ presetup: true });
    const { frontend, target } = pair;
    await frontend.startQueues(1, { size: 64 });
    await frontend.stop({ order: "new" });
    await presetup(frontend, frontend.queues);
    expect(target.prepared?.config).toEqual(target.config);
    const early = target.prepared?.config;
    await frontend.resumeQueues([0]);
    expect(target.running?.config).toEqual(target.config);
    expect(target.running?.config).not.toEqual(early);
  });

  test("what cannot be read is the failure of the start, not of the features", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await frontend.negotiate();
    await frontend.setupMemory(REGIONS);
    target.before = (operation) => {
      if (operation === "readConfig") throw new VhostdError("again", "it changes all the time");
    };
    expect(await frontend.setFeatures()).toBe(0n);
    expect(pair.session.status.state).toBe("negotiated");
    await frontend.startQueues(1, { size: 64 }).catch(() => {});
    expect((await pair.ended).reason).toBe("it changes all the time");
    expect(target.running).toBeUndefined();
  });
});

describe("standing by", () => {
  test("begins when a front-end says that it owns the session, and not again", async () => {
    await using pair = connect();
    expect(pair.target.standBys).toBe(0);
    await startRunning(pair.frontend, 1);
    expect(pair.target.standBys).toBe(1);
    await pair.frontend.stop({ order: "new" });
    await pair.frontend.resumeQueues([0]);
    await pair.frontend.command(Request.RESET_DEVICE);
    expect(pair.target.standBys).toBe(1);
  });

  test("does not for a session that goes on", async () => {
    await using pair = connect();
    const revived = async () => {
      const { data, fds } = copySession(pair.session);
      const target = new MockTarget();
      const session = Session.revive(target, data, fds, { log: silentLogger, quietPeriod: LONG_QUIET });
      // It has no end where it is abandoned.
      void session.run();
      await session.abandon();
      return target.standBys;
    };
    await pair.frontend.negotiate();
    await pair.frontend.setFeatures();
    expect(await revived()).toBe(0);
    await startRunning(pair.frontend, 1);
    expect(await revived()).toBe(0);
  });
});
