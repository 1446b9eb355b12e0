import { describe, expect, test } from "bun:test";
import { OwnedFd } from "../../../src/native/fd.ts";
import { Request } from "../../../src/vhost-user/messages.ts";
import { attemptsOf, SessionPage } from "../../../src/vhost-user/session-page.ts";
import { FrontendDirtyLog } from "../../kit/frontend/dirty-log.ts";
import { startLogging } from "../../kit/frontend/migration-messages.ts";
import { fdsLeftBy, REGIONS } from "./harness.ts";
import { type HostOptions, KillableHost } from "./killable-host.ts";

/** Kills each process that looks at a message of that request. */
class DeadlyHost extends KillableHost {
  deadly: number | undefined;

  constructor(options: HostOptions = {}) {
    super({ ...options, whileAnswering: false });
  }

  override reach(event: string): void {
    if (event === "came") {
      if (Number(this["message"]) === this.deadly) this.killNext();
    }
    super.reach(event);
  }

  get attempts(): number {
    const fd = new OwnedFd(this.session.snapshot().fds.get("page")!);
    try {
      return attemptsOf(fd);
    } finally {
      fd.release();
    }
  }
}

describe("a message that kills whoever handles it", () => {
  test("is not handled a fourth time: the session ends", async () => {
    const left = await fdsLeftBy(async () => {
      await using host = new DeadlyHost();
      await host.frontend.negotiate();
      await host.frontend.setupMemory(REGIONS.slice(2));
      await host.frontend.startQueues(1, { size: 64 });
      host.deadly = Request.GET_STATUS;
      const asked = host.frontend.askU64(Request.GET_STATUS).catch(() => {});
      const { error } = await host.ended.promise;
      await asked;
      expect(error?.message).toBe("the daemon has died 3 times while it took up this session or handled GET_STATUS");
      expect(host.deaths).toBe(3);
      expect(host.target.mapped).toEqual([]);
      expect(host.target.running).toBeUndefined();
    });
    expect(left).toBe(0);
  });

  test("freezes a function that marks what it writes, and marks all, before the session ends", async () => {
    const [, , region] = REGIONS;
    using log = new FrontendDirtyLog(region!.gpa + region!.size);
    await using host = new DeadlyHost({ dirtyTracking: true });
    const { frontend, target } = host;
    await frontend.negotiate();
    await frontend.setupMemory([region!]);
    await frontend.startQueues(1, { size: 64 });
    await startLogging(frontend, log);
    log.take();
    host.deadly = Request.GET_STATUS;
    const asked = frontend.askU64(Request.GET_STATUS).catch(() => {});
    while (log.look().length < region!.size / 4096) await Bun.sleep(1);
    expect(target.running).toBeUndefined();
    log.take();
    const { error } = await host.ended.promise;
    await asked;
    expect(error?.message).toContain("handled GET_STATUS");
  });
});

describe("processes that die one after the other do not end a session", () => {
  test("that has finished a message in between", async () => {
    await using host = new DeadlyHost();
    await host.frontend.askU64(Request.GET_FEATURES);
    for (let round = 0; round < 4; round++) {
      host.killNext();
      await host.frontend.askU64(Request.GET_FEATURES);
    }
    expect(host.deaths).toBe(4);
    while (host.attempts > 0) await Bun.sleep(1);
  });

  test("for which no message waits", async () => {
    await using host = new DeadlyHost();
    await host.frontend.askU64(Request.GET_FEATURES);
    for (let deaths = 1; deaths <= 5; deaths++) {
      try {
        host["kill"]();
      } catch {}
      while (host["dying"] !== undefined || host.attempts > 0) await Bun.sleep(1);
    }
    await host.frontend.askU64(Request.GET_FEATURES);
    expect(host.deaths).toBe(5);
  });
});

describe("the page of a session", () => {
  const again = (page: SessionPage) => {
    const fd = new OwnedFd(page.fd);
    try {
      return SessionPage.revive(fd.dup());
    } finally {
      fd.release();
    }
  };

  test("keeps a note when an attempt is written, and attempts when a note is", () => {
    using page = SessionPage.create();
    page.noteAttempt();
    page.noteAttempt();
    page.noteAnswering(Uint8Array.of(1, 2), new Uint8Array(5000).fill(3));
    {
      using other = again(page);
      expect(other.attempts).toBe(2);
      other.noteAttempt();
    }
    using other = again(page);
    expect(other.attempts).toBe(3);
    const { note } = other;
    expect(note.stage === "answering" && note.bytes.every((byte, at) => byte === (at < 2 ? at + 1 : 3))).toBe(true);
    other.noteTaken();
    using third = again(page);
    expect([third.note.stage, third.attempts]).toEqual(["taken", 3]);
    third.clear();
    using cleared = again(page);
    expect([cleared.note.stage, cleared.attempts]).toEqual(["none", 0]);
  });
});
