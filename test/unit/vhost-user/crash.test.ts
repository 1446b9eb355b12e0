import { describe, expect, test } from "bun:test";
import { VhostdError } from "../../../src/base/errors.ts";
import { silentLogger } from "../../../src/base/log.ts";
import type { OwnedFd } from "../../../src/native/fd.ts";
import { eventfd, memfd, socketPair } from "../../../src/native/sys.ts";
import { encodeMessage, PROTOCOL_VERSION, Request, VRING_ADDR, VRING_STATE } from "../../../src/vhost-user/messages.ts";
import { Session } from "../../../src/vhost-user/session.ts";
import { featureBits } from "../../../src/virtio/features.ts";
import { memTable, u64, VhostUserFrontend, withoutFd } from "../../kit/frontend/frontend.ts";
import { FrontendMemory } from "../../kit/frontend/memory.ts";
import { MockTarget } from "../../kit/mock-target.ts";
import { copySession } from "./copy-session.ts";
import { connect, fdsLeftBy, LONG_QUIET, REGIONS, startRunning } from "./harness.ts";

describe("a front-end that goes away", () => {
  test("at every byte of a start leaves nothing mapped and no fd open", async () => {
    using memory = new FrontendMemory([{ gpa: 0, size: 1 << 16 }]);
    using kick = eventfd();
    const trace = startTrace(memory, kick);
    const bytes = trace.reduce((sum, message) => sum + message.bytes.length, 0);
    const furthest = new Set<string>();
    const left = await fdsLeftBy(async () => {
      for (let cut = 0; cut <= bytes; cut++) {
        await using pair = connect();
        await send(pair.frontend, trace, cut);
        pair.frontend[Symbol.dispose]();
        const end = await pair.ended;
        expect(end.reason).toMatch(/closed the connection|hung up after/);
        expect(pair.target.mapped).toEqual([]);
        expect(pair.target.running).toBeUndefined();
        for (const call of pair.target.calls) furthest.add(call);
      }
    });
    expect(left).toBe(0);
    expect([...furthest]).toEqual(["release", "map 0x0+0x10000", "unmap 0x0+0x10000", "start 0@0"]);
  });

  test("a message that comes in pieces is one message", async () => {
    using memory = new FrontendMemory([{ gpa: 0, size: 1 << 16 }]);
    using kick = eventfd();
    const trace = startTrace(memory, kick);
    await using pair = connect();
    for (const { bytes, fds } of trace) {
      for (const [start, end] of ANYWHERE) {
        await pair.frontend.channel.sendRaw(bytes.slice(start, end), start === 0 ? fds : []);
        await Bun.sleep(3);
      }
    }
    expect(await pair.frontend.askU64(Request.GET_STATUS)).toBe(0xfn);
    expect(pair.target.running?.queues).toHaveLength(1);
  });
});

describe("a session as plain data and fds", () => {
  test("is rebuilt after every message, and nobody notices", async () => {
    const left = await fdsLeftBy(async () => {
      const [ours, theirs] = socketPair();
      const target = new MockTarget();
      using frontend = new VhostUserFrontend(theirs);
      let { session, ended } = begin(new Session(ours, target, options));
      await frontend.negotiate();

      let revivals = 0;
      const sendRaw = frontend.channel.sendRaw.bind(frontend.channel);
      frontend.channel.sendRaw = async (bytes, fds) => {
        ({ session, ended } = begin(await rebuild(session, target)));
        revivals++;
        await sendRaw(bytes, fds);
      };
      await frontend.setupMemory(REGIONS);
      await frontend.startQueues(2, { size: 64 });
      frontend.queues[1]!.driver.ring.submit([new Uint8Array(1)], []);
      target.changeConfig(Uint8Array.of(42));
      await frontend.backendRequests!.wait(1);
      const bases = await frontend.stop({ order: "old" });
      expect(bases).toEqual([0, 1]);
      await frontend.resumeQueues(bases);

      expect(revivals).toBeGreaterThan(40);
      // What an earlier process has mapped is made sure of before each start, and nowhere else.
      const maps = ["map 0x0+0xa0000", "map 0xc0000+0x100000", "map 0x100000000+0x800000"];
      expect(target.calls).toEqual([
        ...maps,
        ...[...maps, "start 0@0 1@0", "setKick 0 off", "setKick 1 off", "stop"],
        ...[...maps, "start 0@0 1@1"],
      ]);
      frontend[Symbol.dispose]();
      expect((await ended).reason).toContain("closed the connection");
      expect(target.mapped).toEqual([]);
    });
    expect(left).toBe(0);
  });

  test("has its memory mapped before the device starts, where the process before had let go of it", async () => {
    const [ours, theirs] = socketPair();
    using frontend = new VhostUserFrontend(theirs);
    const first = new Session(ours, new MockTarget(), options);
    begin(first);
    await startRunning(frontend, 1);
    const bases = await frontend.stop({ order: "new" });
    const target = new MockTarget();
    const { ended } = begin(await rebuild(first, target));
    await frontend.resumeQueues(bases);
    await frontend.resumeQueues(await frontend.stop({ order: "new" }));
    expect(target.calls.filter((call) => /map|start/.test(call))).toEqual([
      ...["map 0x0+0xa0000", "map 0xc0000+0x100000", "map 0x100000000+0x800000"],
      ...["start 0@0", "start 0@0"],
    ]);
    frontend[Symbol.dispose]();
    await ended;
  });

  test("ends where the memory of its rings cannot be mapped again", async () => {
    const [ours, theirs] = socketPair();
    using frontend = new VhostUserFrontend(theirs);
    const first = new Session(ours, new MockTarget(), options);
    begin(first);
    await startRunning(frontend, 1);
    const bases = await frontend.stop({ order: "new" });
    const target = new MockTarget();
    target.before = (operation) => {
      if (operation === "map") throw new VhostdError("iommuDomain", "the IOMMU has no room");
    };
    const { ended } = begin(await rebuild(first, target));
    await frontend.resumeQueues(bases).catch(() => {});
    expect((await ended).error?.message).toBe("the IOMMU has no room");
    expect(target.calls).not.toContain("start 0@0");
  });

  test("holds what a checkpoint in the middle of a message must hold", async () => {
    await using pair = connect();
    const { frontend, session, target } = pair;
    const kinds: unknown[] = [];
    target.onCheckpoint = () => {
      const { data, fds } = session.snapshot();
      kinds.push((data as { state: { kind: string } }).state.kind);
      for (const fd of fds.values()) expect(fd).toBeGreaterThanOrEqual(0);
      expect(fds.keys().next().value).toBe("connection");
    };
    await startRunning(frontend, 1);
    expect(kinds.at(-1)).toBe("running");
    await frontend.getBase(0);
    expect(kinds.at(-1)).toBe("stopped");
    expect(new Set(kinds)).toEqual(new Set(["connected", "negotiated", "running", "stopped"]));
  });

  test("a start that waits for quiet is not forgotten", async () => {
    const [ours, theirs] = socketPair();
    const target = new MockTarget();
    using frontend = new VhostUserFrontend(theirs);
    let { session, ended } = begin(new Session(ours, target, options));
    await frontend.negotiate({ protocolFeatures: ~featureBits(16) });
    await frontend.setupMemory(REGIONS);
    await frontend.startQueues(1, { size: 64 });
    const started = Promise.withResolvers<void>();
    target.onStart = started.resolve;
    ({ session, ended } = begin(await rebuild(session, target, 1)));
    await started.promise;
    frontend[Symbol.dispose]();
    await ended;
  });

  test("a ring that was being enabled is enabled by the next process", async () => {
    const [ours, theirs] = socketPair();
    const target = new MockTarget();
    using frontend = new VhostUserFrontend(theirs);
    const first = new Session(ours, target, options);
    begin(first);
    frontend.enableAll = async () => void (await frontend.enable(0, true));
    await startRunning(frontend, 2);
    let stored = first.snapshot().data;
    target.onCheckpoint = () => {
      stored = first.snapshot().data;
    };
    const dying = Promise.withResolvers<void>();
    target.before = (operation) => {
      if (operation !== "enable") return;
      dying.resolve();
      return new Promise(() => {});
    };
    frontend.replies = "as QEMU";
    await frontend.enable(1, true);
    await dying.promise;
    const { fds } = copySession(first);
    await first.abandon();
    target.onCheckpoint = () => {};
    const enabled = Promise.withResolvers<void>();
    target.before = (operation) => void (operation === "enable" && enabled.resolve());
    const { session, ended } = begin(Session.revive(target, stored, fds, { ...options, quietPeriod: 1 }));
    expect(session.isBehind).toBe(true);
    await enabled.promise;
    expect(target.calls.at(-1)).toBe("enable 0 1");
    frontend[Symbol.dispose]();
    await ended;
  });

  test("a ring that is polled is not taken for one whose kick is missing", async () => {
    const [ours, theirs] = socketPair();
    const target = new MockTarget();
    using frontend = new VhostUserFrontend(theirs);
    const first = new Session(ours, target, options);
    begin(first);
    await frontend.negotiate();
    await frontend.setupMemory(REGIONS);
    await frontend.startQueues(1, { size: 64 });
    await frontend.command(Request.SET_VRING_KICK, withoutFd(0));
    const { session, ended } = begin(await rebuild(first, target));
    expect(await frontend.stop({ order: "old" })).toEqual([0]);
    session.close("the test is over");
    await ended;
  });

  test("that is damaged is refused, and its fds are closed", async () => {
    const damages: ((data: Record<string, unknown>, fds: Map<string, OwnedFd>) => void)[] = [
      (data) => {
        data["state"] = { kind: "running" };
      },
      (data) => {
        data["extra"] = 1;
      },
      (data) => {
        data["rings"] = [{ index: 200, size: 64, base: 0, started: true, enabled: true }];
      },
      (data) => {
        data["rings"] = [{ index: 0, size: 63, base: 0, started: true, enabled: true }];
      },
      (data) => {
        data["state"] = { kind: "negotiated", features: "0xffffffffffffffff" };
      },
      (data) => {
        data["rings"] = [];
      },
      (_data, fds) => fds.delete("connection"),
      (_data, fds) => {
        fds.get("kick.0")?.[Symbol.dispose]();
        fds.delete("kick.0");
      },
      (_data, fds) => {
        fds.get("page")?.[Symbol.dispose]();
        fds.delete("page");
      },
      (_data, fds) => {
        fds.get("page")?.[Symbol.dispose]();
        fds.set("page", memfd("another size", 8192));
      },
      (_data, fds) => {
        fds.get("kick.0")?.[Symbol.dispose]();
        fds.set("kick.0", memfd("no eventfd", 4096));
      },
      (_data, fds) => {
        fds.get("region.0")?.[Symbol.dispose]();
        fds.set("region.0", eventfd());
      },
    ];
    await using pair = connect();
    await startRunning(pair.frontend, 1);
    for (const damage of damages) {
      const left = await fdsLeftBy(async () => {
        const { data, fds } = copySession(pair.session);
        const lost = fds.get("connection");
        damage(data as Record<string, unknown>, fds);
        expect(() => Session.revive(new MockTarget(), data, fds, options)).toThrow();
        if (!fds.has("connection")) lost?.[Symbol.dispose]();
      });
      expect(left).toBe(0);
    }
  });
});

const options = { log: silentLogger, quietPeriod: LONG_QUIET };

function begin(session: Session) {
  return { session, ended: session.run() };
}

async function rebuild(session: Session, target: MockTarget, quietPeriod = LONG_QUIET): Promise<Session> {
  const { data, fds } = copySession(session);
  await session.abandon();
  return Session.revive(target, data, fds, { ...options, quietPeriod });
}

const ANYWHERE = [
  [0, 5],
  [5, 13],
  [13, undefined],
] as const;

interface TraceMessage {
  readonly bytes: Uint8Array;
  readonly fds: readonly number[];
}

/** The shortest way to a running ring. */
function startTrace(memory: FrontendMemory, kick: OwnedFd): TraceMessage[] {
  const [region] = memory.regions;
  const at = (gpa: number) => region!.userAddress + gpa;
  const message = (request: number, payload: Uint8Array, fds: readonly number[] = []) => ({
    bytes: encodeMessage(request, PROTOCOL_VERSION, payload),
    fds,
  });
  return [
    message(Request.SET_PROTOCOL_FEATURES, u64(featureBits(16))),
    message(Request.SET_FEATURES, u64(featureBits(30, 32))),
    message(Request.SET_MEM_TABLE, memTable(memory.regions), [region!.file.file.number]),
    message(Request.SET_VRING_NUM, VRING_STATE.encode({ index: 0, num: 16 })),
    message(
      Request.SET_VRING_ADDR,
      VRING_ADDR.encode({ index: 0, descriptor: at(0), available: at(0x1000), used: at(0x2000) }),
    ),
    message(Request.SET_VRING_KICK, u64(0n), [kick.number]),
    message(Request.SET_STATUS, u64(0xfn)),
  ];
}

/** The first `length` bytes of the trace; fds go with the first byte of their message. */
async function send(frontend: VhostUserFrontend, trace: readonly TraceMessage[], length: number): Promise<void> {
  let left = length;
  for (const { bytes, fds } of trace) {
    if (left === 0) return;
    await frontend.channel.sendRaw(bytes.slice(0, left), fds);
    left = Math.max(0, left - bytes.length);
  }
}
