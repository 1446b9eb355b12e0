import { describe, expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { VhostdError } from "../../../src/base/errors.ts";
import { silentLogger } from "../../../src/base/log.ts";
import { liveFds, type OwnedFd } from "../../../src/native/fd.ts";
import { eventfd, fileInfo, memfd, openFile, socketPair, truncate } from "../../../src/native/sys.ts";
import { LOG_DESCRIPTION, ProtocolFeature, Request, VRING_ADDR } from "../../../src/vhost-user/messages.ts";
import { Session } from "../../../src/vhost-user/session.ts";
import { type DirtyLog, LOG_BYTE, LOG_PAGE } from "../../../src/virtio/dirty-log.ts";
import { FeatureBit, featureBits } from "../../../src/virtio/features.ts";
import { FrontendDirtyLog } from "../../kit/frontend/dirty-log.ts";
import { u64, type VhostUserFrontend } from "../../kit/frontend/frontend.ts";
import { setLogBase, startLogging, stopLogging } from "../../kit/frontend/migration-messages.ts";
import { MockTarget } from "../../kit/mock-target.ts";
import { copySession } from "./copy-session.ts";
import { connect, fdsLeftBy, LONG_QUIET, ONE_MEGABYTE, type Pair, REGIONS, startRunning } from "./harness.ts";

const END = 0x1_0000_0000 + 8 * ONE_MEGABYTE;
const SHORT = 5;
const LOG_ALL = featureBits(FeatureBit.vhostLogAll);

const options = { log: silentLogger, quietPeriod: SHORT };

/** A running device of two queues that can mark what it writes. */
async function running(quietPeriod = LONG_QUIET): Promise<Pair> {
  const pair = connect({ dirtyTracking: true, quietPeriod });
  await startRunning(pair.frontend, 2);
  return pair;
}

/** Calls that came after the start. */
function since({ target }: Pair, before: number): string[] {
  return target.calls.slice(before);
}

const tracked = (log: DirtyLog, end = END) => `track ${log.size} bytes, end 0x${end.toString(16)}`;

/** Pages of guest memory as REGIONS has it: first and last of each region. */
const EDGES = REGIONS.flatMap(({ gpa, size }) => [gpa / LOG_PAGE, (gpa + size) / LOG_PAGE - 1]);
const PAGES = REGIONS.reduce((sum, { size }) => sum + size / LOG_PAGE, 0);

describe("the device marks what it writes", () => {
  test("from bit 26 and a log on, and no longer than bit 26; neither stops it", async () => {
    await using pair = await running();
    const { frontend, target } = pair;
    using log = new FrontendDirtyLog(frontend.memory.end);
    const before = target.calls.length;
    expect(frontend.has(ProtocolFeature.LOG_SHMFD)).toBe(true);
    await startLogging(frontend, log);
    expect(since(pair, before)).toEqual([tracked(log)]);
    expect(target.tracking?.end).toBe(END);
    await stopLogging(frontend);
    await frontend.askU64(Request.GET_STATUS);
    expect(since(pair, before)).toEqual([tracked(log), "track off"]);
    await startLogging(frontend, log);
    expect(since(pair, before)).toHaveLength(3);
    expect(target.running).toBeDefined();
  });

  test("also where the log comes last, before the device runs", async () => {
    await using pair = connect({ dirtyTracking: true });
    const { frontend, target } = pair;
    await frontend.negotiate();
    using log = new FrontendDirtyLog(END);
    expect(await frontend.setFeatures(frontend.features | LOG_ALL)).toBe(0n);
    await frontend.setupMemory(REGIONS);
    expect(target.tracking).toBeUndefined();
    await setLogBase(frontend, log);
    expect(target.calls.at(-1)).toBe(tracked(log));
  });

  test("until the session ends: the function is at rest then, and its memory still mapped", async () => {
    await using pair = await running();
    const { frontend, target } = pair;
    using log = new FrontendDirtyLog(END);
    await startLogging(frontend, log);
    const before = target.calls.length;
    frontend.channel[Symbol.dispose]();
    await pair.ended;
    expect(since(pair, before).slice(0, 3)).toEqual(["release", "track off", "unmap 0x0+0xa0000"]);
  });

  test("in the new log before the old one is closed; the same one again changes nothing", async () => {
    await using pair = await running();
    const { frontend, target } = pair;
    using small = new FrontendDirtyLog(END);
    using big = new FrontendDirtyLog(2 * END);
    await startLogging(frontend, small);
    const before = target.calls.length;
    await setLogBase(frontend, small);
    expect(since(pair, before)).toEqual([]);
    const inUse = fileInfo(small.fd).ino;
    const { fd } = target.tracking!.log;
    const seen: number[] = [];
    target.before = (operation) => void (operation === "track" && seen.push(fileInfo(fd).ino));
    await setLogBase(frontend, big);
    expect(seen).toEqual([inUse]);
    expect(since(pair, before)).toEqual([tracked(big)]);
  });

  test("and a log that is repeated a thousand times leaves no fd", async () => {
    const left = await fdsLeftBy(async () => {
      await using pair = await running();
      using one = new FrontendDirtyLog(END);
      using other = new FrontendDirtyLog(END);
      await startLogging(pair.frontend, one);
      const open = liveFds();
      for (let times = 0; times < 500; times++) {
        await setLogBase(pair.frontend, other);
        await setLogBase(pair.frontend, one);
      }
      expect(pair.target.calls.at(-1)).toBe(tracked(one));
      expect(liveFds()).toBe(open);
    });
    expect(left).toBe(0);
  });

  test("up to the end of guest memory as it is now", async () => {
    await using pair = await running();
    const { frontend, target } = pair;
    using log = new FrontendDirtyLog(4 * END);
    await startLogging(frontend, log);
    const before = target.calls.length;
    const added = frontend.memory.add(0x2_0000_0000, ONE_MEGABYTE);
    expect(await frontend.addRegion(added)).toBe(0n);
    expect(await frontend.removeRegion(frontend.memory.regions[0]!)).toBe(0n);
    expect(await frontend.removeRegion(added)).toBe(0n);
    expect(since(pair, before)).toEqual([
      ...["map 0x200000000+0x100000", tracked(log, 0x2_0010_0000)],
      ...["unmap 0x0+0xa0000", "unmap 0x200000000+0x100000", tracked(log)],
    ]);
  });

  test("wherever the front-end says that the used ring is logged", async () => {
    await using pair = await running();
    const { frontend, target, lines } = pair;
    using log = new FrontendDirtyLog(END);
    await startLogging(frontend, log);
    expect(lines.filter((line) => line.includes("is to be logged"))).toEqual([]);
    const odd = VRING_ADDR.encode({
      ...VRING_ADDR.read(frontend.ringAddresses(frontend.queues[1]!, { log: true })),
      log: 2n ** 64n - 1n,
    });
    expect(await frontend.answered(Request.SET_VRING_ADDR, odd)).toBe(0n);
    expect(lines.at(-1)).toContain("ring 1 is to be logged at 0xffffffffffffffff");
    expect(target.running).toBeDefined();
  });

  test("and an eventfd for the log is closed", async () => {
    await using pair = await running();
    using fd = eventfd();
    const open = liveFds();
    expect(await pair.frontend.answered(Request.SET_LOG_FD, new Uint8Array(), [fd.number])).toBe(0n);
    expect(liveFds()).toBe(open);
  });
});

describe("without dirty tracking", () => {
  test("bit 26 is not offered, and a log is taken for nothing", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await startRunning(frontend, 1);
    expect(frontend.has(ProtocolFeature.LOG_SHMFD)).toBe(false);
    using log = new FrontendDirtyLog(END);
    const payload = LOG_DESCRIPTION.encode(log);
    expect(await frontend.answered(Request.SET_LOG_BASE, payload, [log.fd])).toBe(0n);
    expect(target.calls.some((call) => call.startsWith("track"))).toBe(false);
  });
});

describe("a log that cannot be one ends the session", () => {
  type Send = (frontend: VhostUserFrontend) => Promise<unknown>;
  const cases: Record<string, { send: Send; reason: string[] }> = {
    "a socket": { send: withFile(socket), reason: ["kind socket", "regular file on tmpfs"] },
    "an eventfd": { send: withFile(eventfd), reason: ["kind eventfd", "regular file"] },
    "a device": { send: withFile(() => openFile("/dev/null", "read-write")), reason: ["kind other", "regular file"] },
    "no size": { send: withFile(file, { size: 0 }), reason: ["size is 0"] },
    "an odd offset": { send: withFile(file, { offset: 8, size: 4096 }), reason: ["0x8", "multiple of 4096"] },
    "more than the file has": { send: withFile(file, { size: 0x4001 }), reason: ["0x4001", "0x4000 bytes"] },
    "an offset that overflows": {
      send: withFile(file, { offset: 2 ** 53 - 4096, size: 2 ** 53 - 4096 }),
      reason: ["0x1ffffffffff000", "0x4000 bytes"],
    },
    "an address beyond 2^53": {
      send: (frontend) => frontend.send(Request.SET_LOG_BASE, new Uint8Array(16).fill(0xff), [0]),
      reason: ["2^53"],
    },
    "no fd": {
      send: (frontend) => frontend.send(Request.SET_LOG_BASE, new Uint8Array(16)),
      reason: ["0 fds", "must be 16 bytes and 1 fd"],
    },
    "the payload of a log that is not shared": {
      send: (frontend) => frontend.send(Request.SET_LOG_BASE, u64(0n)),
      reason: ["8 bytes of payload", "must be 16"],
    },
    "a log fd that is no eventfd": {
      send: async (frontend) => {
        using bad = file();
        await frontend.send(Request.SET_LOG_FD, new Uint8Array(), [bad.number]);
      },
      reason: ["log fd", "kind regular"],
    },
  };
  for (const [what, { send, reason }] of Object.entries(cases)) {
    test(what, async () => {
      const left = await fdsLeftBy(async () => {
        await using pair = await running();
        await send(pair.frontend).catch(() => {});
        const end = await pair.ended;
        for (const part of reason) expect(end.reason).toContain(part);
        expect(pair.target.running).toBeUndefined();
      });
      expect(left).toBe(0);
    });
  }

  function socket(): OwnedFd {
    const [one, other] = socketPair();
    other[Symbol.dispose]();
    return one;
  }

  function file(): OwnedFd {
    return memfd("log", 4 * LOG_PAGE);
  }

  function withFile(make: () => OwnedFd, { offset = 0, size = LOG_PAGE } = {}): Send {
    return async (frontend) => {
      using fd = make();
      await frontend.send(Request.SET_LOG_BASE, LOG_DESCRIPTION.encode({ offset, size }), [fd.number]);
    };
  }
});

describe("a device that does not mark all that it writes is stopped, and every page is marked", () => {
  /** A device that is running, and whose tracking fails as `fail` says, seen by a front-end that migrates. */
  async function lost(pair: Pair, log: FrontendDirtyLog, reason: string): Promise<void> {
    const { frontend, target, lines } = pair;
    // Answered all the same: the VMM would abort its guest.
    expect(await frontend.askU64(Request.GET_STATUS)).toBe(0xfn);
    expect(target.running).toBeUndefined();
    expect(lines.some((line) => line.includes("the device is stopped, because not every page"))).toBe(true);
    // Nothing starts it again, and the connection stays until the front-end has looked into its log.
    await frontend.setupQueue(frontend.queues[0]!);
    await frontend.enable(0, true);
    await frontend.command(Request.SET_STATUS, u64(0xfn));
    await Bun.sleep(5 * SHORT);
    expect(await frontend.getBase(0)).toBe(0);
    expect(target.running).toBeUndefined();
    expect(pair.session.status.state).not.toBe("closed");
    const marked = log.take();
    expect(marked).toEqual(expect.arrayContaining(EDGES));
    expect(marked).toHaveLength(PAGES);
    const end = await pair.ended;
    expect(end.reason).toContain(reason);
    expect(end.error).toBeInstanceOf(Error);
    expect(log.look()).toEqual([]);
  }

  test("where tracking cannot start", async () => {
    await using pair = await running(SHORT);
    using log = new FrontendDirtyLog(END);
    pair.target.before = (operation) => {
      if (operation === "track") throw new VhostdError("notSupported", "the device has no room");
    };
    await startLogging(pair.frontend, log);
    expect(pair.target.calls.at(-1)).toBe("stop");
    pair.target.before = () => {};
    await lost(pair, log, "the device has no room");
  });

  test("where it breaks later", async () => {
    await using pair = await running(SHORT);
    using log = new FrontendDirtyLog(END);
    await startLogging(pair.frontend, log);
    pair.target.loseTracking(new VhostdError("io", "the PF does not answer"));
    pair.target.loseTracking(new VhostdError("io", "the PF does not answer"));
    await lost(pair, log, "the PF does not answer");
    expect(pair.target.calls.filter((call) => call === "stop")).toHaveLength(1);
    expect(pair.target.calls.filter((call) => call === "track off")).toHaveLength(1);
  });

  test("where memory outgrows the log", async () => {
    await using pair = await running(SHORT);
    const { frontend } = pair;
    using log = new FrontendDirtyLog(END);
    await startLogging(frontend, log);
    const room = log.size * LOG_BYTE;
    expect(await frontend.addRegion(frontend.memory.add(room, ONE_MEGABYTE))).toBe(0n);
    await lost(pair, log, `a dirty log of ${log.size} bytes is too small for guest memory up to 0x`);
  });

  test("where it was reset because it does not stop", async () => {
    await using pair = await running(SHORT);
    const { target } = pair;
    using log = new FrontendDirtyLog(END);
    await startLogging(pair.frontend, log);
    const order: string[] = [];
    target.before = (operation) => {
      order.push(`${operation} with ${log.look().length} pages`);
      if (operation === "stop") throw new VhostdError("freezeFailed", "it has not drained");
    };
    target.loseTracking(new VhostdError("io", "the PF does not answer"));
    await pair.frontend.askU64(Request.GET_STATUS);
    expect(order).toEqual(["stop with 0 pages", "reset with 0 pages"]);
    target.before = () => {};
    await lost(pair, log, "the PF does not answer");
  });

  test("a log that is too small: as far as it has room", async () => {
    await using pair = await running(SHORT);
    const { frontend } = pair;
    using log = new FrontendDirtyLog(LOG_BYTE);
    const room = log.size * LOG_BYTE;
    await frontend.addRegion(frontend.memory.add(room - ONE_MEGABYTE, 2 * ONE_MEGABYTE));
    await startLogging(frontend, log);
    const marked = log.take();
    expect(marked).toHaveLength((0xa0000 + 2 * ONE_MEGABYTE) / LOG_PAGE);
    expect(marked.at(-1)).toBe(room / LOG_PAGE - 1);
    expect((await pair.ended).reason).toContain("too small");
  });

  test("a log that was made shorter meanwhile harms nobody", async () => {
    await using pair = await running(SHORT);
    using file = memfd("log", 64 * LOG_PAGE);
    await startLogging(pair.frontend, { fd: file.number, offset: 0, size: 64 * LOG_PAGE });
    truncate(file.number, 0);
    pair.target.loseTracking(new VhostdError("io", "the log has gone"));
    expect((await pair.ended).reason).toBe("the log has gone");
    expect(pair.lines.some((line) => line.includes("could not be completed"))).toBe(true);
  });

  test("and where the migration is cancelled, the connection is closed without a look", async () => {
    await using pair = await running(SHORT);
    using log = new FrontendDirtyLog(END);
    await startLogging(pair.frontend, log);
    pair.target.loseTracking(new VhostdError("io", "the PF does not answer"));
    await stopLogging(pair.frontend);
    expect((await pair.ended).reason).toBe("the PF does not answer");
    expect(log.look()).toHaveLength(PAGES);
  });

  test("the session does not end before the front-end has had time to give the migration up, nor while it does", async () => {
    await using pair = await running(SHORT);
    const { frontend, session, target } = pair;
    using log = new FrontendDirtyLog(END);
    await startLogging(frontend, log);
    target.loseTracking(new VhostdError("io", "the PF does not answer"));
    await frontend.askU64(Request.GET_STATUS);
    log.take();
    // Seen, and quiet for a while: a connection that is lost now would be lost while the front-end speaks.
    await Bun.sleep(20 * SHORT);
    await frontend.send(Request.SET_FEATURES, u64(frontend.features));
    await Bun.sleep(5 * SHORT);
    expect(await frontend.askU64(Request.GET_STATUS)).toBe(0xfn);
    expect(session.status.state).not.toBe("closed");
    expect((await pair.ended).reason).toBe("the PF does not answer");
  });

  test("what is lost after tracking was wanted no longer stops nothing", async () => {
    await using pair = await running(SHORT);
    using log = new FrontendDirtyLog(END);
    await startLogging(pair.frontend, log);
    await stopLogging(pair.frontend);
    await pair.frontend.askU64(Request.GET_STATUS);
    pair.target.loseTracking(new VhostdError("io", "the PF does not answer"));
    expect(await pair.frontend.getBase(3)).toBe(0);
    expect(pair.target.running).toBeDefined();
  });

  test("a function that does not even reset is taken from memory before all is marked", async () => {
    await using pair = await running(SHORT);
    const { target, frontend } = pair;
    using log = new FrontendDirtyLog(END);
    await startLogging(frontend, log);
    let marked: number | undefined;
    target.before = (operation) => {
      if (operation === "unmap") marked = log.look().length;
      if (operation === "release") throw new VhostdError("resetTimedOut", "status stays 4");
    };
    frontend.channel[Symbol.dispose]();
    await pair.ended;
    expect(marked).toBe(0);
    expect(log.look()).toHaveLength(PAGES);
  });
});

describe("the next process", () => {
  test("has the function mark what it writes in the same log", async () => {
    await using pair = await running();
    const { frontend, session, target } = pair;
    using log = new FrontendDirtyLog(END);
    await startLogging(frontend, log);
    const { data, fds } = copySession(session);
    expect(data).toMatchObject({ log: { offset: 0, size: log.size } });
    const next = new MockTarget({ dirtyTracking: true });
    const revived = Session.revive(next, data, fds, options);
    const ended = revived.run();
    await revived.checkpoint();
    expect(next.calls).toEqual([tracked(log)]);
    expect(fileInfo(next.tracking!.log.fd).ino).toBe(fileInfo(log.fd).ino);
    revived.close("the test is over");
    await ended;
    expect(target.tracking).toBeDefined();
  });

  test("completes the log of a device that cannot be had to mark any more, and ends the session", async () => {
    await using pair = await running();
    using log = new FrontendDirtyLog(END);
    await startLogging(pair.frontend, log);
    const { data, fds } = copySession(pair.session);
    const next = new MockTarget({ dirtyTracking: false });
    next.before = (operation) => {
      if (operation === "track") throw new VhostdError("notSupported", "the PF cannot be asked");
    };
    const revived = Session.revive(next, data, fds, options);
    const ended = revived.run();
    await revived.checkpoint();
    expect(log.take()).toHaveLength(PAGES);
    expect((await ended).reason).toBe("the PF cannot be asked");
  });

  test("completes the log of a device that did not mark all, and ends the session", async () => {
    await using pair = await running();
    using log = new FrontendDirtyLog(END);
    await startLogging(pair.frontend, log);
    pair.target.loseTracking(new VhostdError("io", "the PF does not answer"));
    await pair.frontend.askU64(Request.GET_STATUS);
    log.take();
    const { data, fds } = copySession(pair.session);
    const ended = Session.revive(new MockTarget({ dirtyTracking: true }), data, fds, options).run();
    await Deadline.after(5_000, "all pages marked").poll(() => log.look().length === PAGES || undefined, 1);
    log.take();
    expect((await ended).reason).toBe("the PF does not answer");
  });

  test("refuses a log that cannot be one", async () => {
    await using pair = await running();
    using log = new FrontendDirtyLog(END);
    await startLogging(pair.frontend, log);
    const damages: ((data: { log: Record<string, unknown> }, fds: Map<string, OwnedFd>) => void)[] = [
      (data) => Object.assign(data.log, { size: 2 * log.size }),
      (data) => Object.assign(data.log, { offset: 1 }),
      (data) => Object.assign(data.log, { size: -1 }),
      (_data, fds) => {
        fds.get("log")?.[Symbol.dispose]();
        fds.delete("log");
      },
    ];
    for (const damage of damages) {
      const left = await fdsLeftBy(async () => {
        const { data, fds } = copySession(pair.session);
        damage(data, fds);
        expect(() => Session.revive(new MockTarget({ dirtyTracking: true }), data, fds, options)).toThrow();
      });
      expect(left).toBe(0);
    }
  });
});
