import { expect, test } from "bun:test";
import { silentLogger } from "../../../src/base/log.ts";
import { socketPair } from "../../../src/native/sys.ts";
import { Request } from "../../../src/vhost-user/messages.ts";
import { Session } from "../../../src/vhost-user/session.ts";
import { SessionPage } from "../../../src/vhost-user/session-page.ts";
import { VhostUserFrontend } from "../../kit/frontend/frontend.ts";
import { MockTarget } from "../../kit/mock-target.ts";
import { copySession } from "../vhost-user/copy-session.ts";

const log = silentLogger;

/** A session that an earlier process has left, and its front-end. */
class LeftSession implements AsyncDisposable {
  /** Its function is taken up when this is resolved. */
  readonly gate = Promise.withResolvers<void>();
  private readonly end: Promise<unknown>;

  private constructor(
    readonly frontend: VhostUserFrontend,
    session: Session,
    onBegin: () => void,
  ) {
    this.end = session.run(async () => {
      onBegin();
      await this.gate.promise;
    });
  }

  /** @param deaths processes that have not finished anything of it */
  static async create(deaths: number, onBegin: () => void): Promise<LeftSession> {
    const [ours, theirs] = socketPair();
    const target = new MockTarget({ queues: 1 });
    const before = new Session(ours, target, { log });
    const { data, fds } = copySession(before);
    await before.abandon();
    {
      using page = SessionPage.revive(fds.get("page")!.dup());
      for (let death = 0; death < deaths; death++) page.noteAttempt();
    }
    const session = Session.revive(target, data, fds, { log });
    return new LeftSession(new VhostUserFrontend(theirs), session, onBegin);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.gate.resolve();
    this.frontend[Symbol.dispose]();
    await this.end;
  }
}

test("sessions that a process may have died of are taken up one after the other, with their first message; others at once", async () => {
  const begun: string[] = [];
  const left = (name: string, deaths: number) => LeftSession.create(deaths, () => begun.push(name));
  await using first = await left("first", 1);
  await using second = await left("second", 2);
  await using innocent = await left("innocent", 0);
  await using third = await left("third", 1);
  innocent.gate.resolve();
  await innocent.frontend.askU64(Request.GET_FEATURES);
  expect(begun.toSorted()).toEqual(["first", "innocent"]);
  const asked = first.frontend.askU64(Request.GET_FEATURES);
  await Bun.sleep(5);
  expect(begun).not.toContain("second");
  first.gate.resolve();
  await asked;
  while (begun.length < 3) await Bun.sleep(1);
  expect(begun.at(-1)).toBe("second");
  await Bun.sleep(5);
  expect(begun).toHaveLength(3);
  for (const one of [second, third]) {
    one.gate.resolve();
    await one.frontend.askU64(Request.GET_FEATURES);
  }
  expect(begun.at(-1)).toBe("third");
});
