import { dlopen } from "bun:ffi";
import { expect, test } from "bun:test";
import { readSync, writeSync } from "node:fs";
import { rm } from "node:fs/promises";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import type { Json } from "../../src/base/json.ts";
import { eventfd, memfd } from "../../src/native/sys.ts";
import { Command, HEADER } from "../../src/vfio-user/messages.ts";
import { encodeMessage, PROTOCOL_VERSION, Request } from "../../src/vhost-user/messages.ts";
import { LOG_PAGE } from "../../src/virtio/dirty-log.ts";
import { u64 } from "../kit/frontend/frontend.ts";
import { HaLab, type Rewritten, rewrite } from "../kit/ha-lab.ts";
import { SteppedGuest } from "../kit/ha-steps.ts";

/** What becomes of a VF that cannot go on as it was left; the one beside it goes on. */
class FallbackLab implements AsyncDisposable {
  private constructor(
    readonly lab: HaLab,
    readonly guest: SteppedGuest,
    readonly other: SteppedGuest,
  ) {}

  /** Does it with a guest at each of two VFs. @throws Error with what the daemons wrote */
  static async with(work: (made: FallbackLab) => Promise<void>): Promise<void> {
    await using made = await FallbackLab.create();
    try {
      await work(made);
    } catch (cause) {
      await Bun.sleep(200);
      throw new Error(made.lab.story, { cause });
    }
  }

  private static async create(): Promise<FallbackLab> {
    await using undo = new AsyncDisposableStack();
    const lab = undo.use(await HaLab.create({ queues: 2 }));
    await lab.startDaemon();
    await lab.addPf();
    const made = new FallbackLab(lab, await SteppedGuest.start(lab), await SteppedGuest.start(lab, 1));
    undo.move();
    return made;
  }

  async removeAndAdd(index = 0): Promise<void> {
    await this.lab.removeVf(index);
    await this.lab.addVf(index);
  }

  /** The VF has failed; removed and added again it serves its guest. @returns why it had failed */
  async isRepaired(): Promise<string> {
    await this.guest.frontend.hungUp();
    const { reason } = await this.lab.vfIs("failed");
    await this.removeAndAdd();
    await this.guest.meetNext();
    await this.guest.progress();
    return reason ?? "";
  }

  /** Nothing was lost, and the one beside it was never disturbed. */
  async end(): Promise<void> {
    await this.guest.end();
    await this.other.isHeard();
    await this.other.end();
    expect(this.other.reconnects).toBe(0);
    expect(await this.lab.call("stats")).toMatchObject({ vfs: 2, sessions: 2, protected: true });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.guest[Symbol.dispose]();
    this.other[Symbol.dispose]();
    await this.lab[Symbol.asyncDispose]();
  }
}

type Change = (stored: Rewritten) => { readonly record: Json; readonly fds: ReadonlyMap<string, number> };

/** A record with other members. */
function withMembers(members: Readonly<Record<string, Json>>): Change {
  return ({ record, fds }) => ({ record: { ...record, ...members }, fds });
}

/** A record without that fd. */
function without(name: string): Change {
  return ({ record, fds }) => {
    if (!fds.delete(name)) throw new Error(`there is no fd ${name}, but ${[...fds.keys()]}`);
    return { record, fds };
  };
}

const EVENT = eventfd();
const FILE = memfd("other", 4096);

/** A record with another file in the place of that fd. */
function swapped(name: string, fd: number): Change {
  return ({ record, fds }) => {
    if (!fds.has(name)) throw new Error(`there is no fd ${name}, but ${[...fds.keys()]}`);
    return { record, fds: fds.set(name, fd) };
  };
}

const NOTHING_IN_IT: Change = ({ fds }) => ({ record: {}, fds });

/** Of one VF and of what belongs to it alone; with what people are told. */
const DAMAGES: readonly (readonly [what: string, key: "vf" | "domain", change: Change, reason: RegExp])[] = [
  ["its session", "vf", withMembers({ session: { state: "what?" } }), /the stored session is not understood/],
  ["its data path", "vf", withMembers({ dataPath: { mover: 7 } }), /./],
  ["its function", "vf", withMembers({ function: { socket: "?" } }), /./],
  ["its options", "vf", withMembers({ options: { address: 7 } }), /what was said of the VF/],
  ["a part that is missing", "vf", ({ record: { dataPath: _, ...record }, fds }) => ({ record, fds }), /dataPath/],
  ["the memory of its VM", "domain", withMembers({ domain: { ranges: "all" } }), /./],
  ["all of the memory's", "domain", NOTHING_IN_IT, /what is mapped for its VM is not known/],
  ["without its function's socket", "vf", without("function:socket"), /./],
  ["without its front-end's connection", "vf", without("session:connection"), /connection/],
  ["without memory of its guest", "vf", without("session:region.0"), /region.0/],
  ["without a file that is mapped", "domain", without("memory.0"), /what is mapped for its VM is not known/],
  ["an eventfd as memory of its guest", "vf", swapped("session:region.0", EVENT.number), /./],
  ["another file that is mapped", "domain", swapped("memory.0", FILE.number), /what is mapped for its VM/],
  ["a file as a kick", "vf", swapped("session:kick.0", FILE.number), /./],
  ["without a kick", "vf", without("session:kick.0"), /kick\.0/],
];

test.each(DAMAGES)(
  "a record is damaged: %s",
  (_, kind, change, expected) =>
    FallbackLab.with(async (made) => {
      const { lab } = made;
      const key = kind === "vf" ? `vf/${lab.vfAt(0)}` : `domain/vfio-user/${lab.vfAt(0)}`;
      await lab.dieAndRevive((keeper) => rewrite(keeper, key, change));
      expect(await made.isRepaired()).toMatch(expected);
      await made.end();
    }),
  60_000,
);

const MEMORY = [{ gpa: 0, size: 1 << 20 }];

/** A record of before the session's memory was given, which is mapped already. */
const withoutMemory: Change = ({ record, fds }) => {
  const session = record["session"] as Readonly<Record<string, Json>>;
  if (!fds.delete("session:region.0")) throw new Error(`there is no memory, but ${[...fds.keys()]}`);
  return { record: { ...record, session: { ...session, regions: [] } }, fds };
};

/** A reset as any client of the function may ask for one. @param socket of a client that is dead */
async function resetFunction(socket: number): Promise<void> {
  writeSync(socket, HEADER.encode({ id: 0xfff0, command: Command.reset, size: HEADER.size, flags: 0, error: 0 }));
  const answer = new Uint8Array(HEADER.size);
  await Deadline.after(5_000, "answer to a reset").poll(() => {
    try {
      return readSync(socket, answer) === answer.length || undefined;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "EAGAIN") throw error;
      return undefined;
    }
  }, 5);
  expect(HEADER.read(answer)).toMatchObject({ id: 0xfff0, error: 0 });
}

const TIOCOUTQ = 0x5411;
const libc = dlopen("libc.so.6", { ioctl: { args: ["i32", "u64", "ptr"], returns: "i32" } }).symbols;

/** A message without its end, which the back-end has taken out of the socket. */
async function sendBegin({ frontend: { channel } }: Pick<SteppedGuest, "frontend">): Promise<void> {
  await channel.sendRaw(encodeMessage(Request.SET_FEATURES, PROTOCOL_VERSION, u64(0n)).subarray(0, 15));
  const left = new Int32Array(1);
  await Deadline.after(5_000, "a message to be taken out").poll(() => {
    expect(libc.ioctl(channel.fd, TIOCOUTQ, left)).toBe(0);
    return left[0] === 0 || undefined;
  }, 2);
}

test(
  "a record of another version: its VF is attached anew, its guest goes on behind a new connection",
  () =>
    FallbackLab.with(async (made) => {
      const { lab, guest } = made;
      await lab.dieAndRevive((keeper) => rewrite(keeper, `vf/${lab.vfAt(0)}`, withMembers({ version: 99 })));
      await guest.meetNext();
      await guest.progress();
      expect(await lab.vf()).toMatchObject({ state: "running", reason: null });
      await made.end();
    }),
  60_000,
);

test(
  "the record of the PF is damaged: its VFs fail, and are served after they and the PF were added again",
  () =>
    FallbackLab.with(async (made) => {
      const { lab, guest, other } = made;
      await lab.dieAndRevive((keeper) => rewrite(keeper, `pf/${lab.pf}`, NOTHING_IN_IT));
      for (const [index, one] of [guest, other].entries()) {
        await one.frontend.hungUp();
        expect((await lab.vfIs("failed", index)).reason).toContain(`PF ${lab.pf} has not been added`);
        await lab.removeVf(index);
      }
      await lab.addPf();
      for (const [index, one] of [guest, other].entries()) {
        await lab.addVf(index);
        await one.meetNext();
        await one.end();
      }
      expect(await lab.call("stats")).toMatchObject({ vfs: 2, sessions: 2, protected: true });
    }),
  60_000,
);

test(
  "the front-end has gone while nobody was there: what it left is undone, and the next one is served",
  () =>
    FallbackLab.with(async (made) => {
      const { lab, guest, other } = made;
      await lab.dieAndRevive(async () => guest.hangUp());
      await guest.meetNext();
      await guest.end();
      await other.isHeard();
      expect(await lab.vf()).toMatchObject({ state: "running", connected: true, reason: null });
      await made.end();
    }),
  60_000,
);

test(
  "all functions vanished while nobody was there: PF and VFs are attached anew",
  () =>
    FallbackLab.with(async (made) => {
      const { lab, guest, other } = made;
      await lab.dieAndRevive(() => lab.replaceSoftvf());
      for (const one of [guest, other]) {
        await one.meetNext();
        await one.end();
      }
      expect((await lab.call<{ pfs: unknown[] }>("pf.list")).pfs).toMatchObject([{ managed: true, reason: null }]);
      expect(await lab.call("stats")).toMatchObject({ vfs: 2, sessions: 2, protected: true });
    }),
  60_000,
);

test(
  "somebody has reset the function while nobody was there: its session ends, and the next one is served",
  () =>
    FallbackLab.with(async (made) => {
      const { lab, guest } = made;
      // Of a request that is under way nobody would know whether it was done.
      await guest.rest();
      await lab.dieAndRevive(async (keeper) => {
        const stored = await keeper.get(`vf/${lab.vfAt(0)}`);
        using fds = new DisposableStack();
        for (const fd of stored?.fds.values() ?? []) fds.use(fd);
        await resetFunction(stored!.fds.get("function:socket")!.number);
      });
      await guest.frontend.hungUp();
      await lab.daemon.line(/somebody has reset the function while nobody served it/, 5_000);
      await guest.meetNext();
      await guest.move();
      await made.end();
    }),
  60_000,
);

test(
  "a VF that is on no bus any more fails, and can be removed",
  () =>
    FallbackLab.with(async (made) => {
      const { lab, guest } = made;
      await lab.dieAndRevive(() => rm(join(lab.directory, "softvf/devices", lab.vfAt(0)), { recursive: true }));
      await guest.frontend.hungUp();
      expect((await lab.vfIs("failed")).reason).toContain(`no function ${lab.vfAt(0)} on the bus directories`);
      await lab.removeVf();
      await made.other.isHeard();
      expect(await lab.call("stats")).toMatchObject({ vfs: 1, sessions: 1, protected: true });
    }),
  60_000,
);

test(
  "a message came in pieces when the daemon died: its connection ends, and no other",
  () =>
    FallbackLab.with(async (made) => {
      const { lab, guest } = made;
      await sendBegin(guest);
      await lab.dieAndRevive(async (keeper) => {
        // It has been taken out.
        const [isThere] = await keeper.readable([[`vf/${lab.vfAt(0)}`, 0]]);
        expect(isThere).toBe(false);
      });
      await guest.frontend.hungUp();
      await lab.daemon.line(/a message that had come in pieces/, 5_000);
      await guest.meetNext();
      await made.end();
    }),
  60_000,
);

test(
  "it died when it had mapped what a message in pieces gives: that is mapped no more, and the next front-end gives other memory",
  () =>
    FallbackLab.with(async (made) => {
      const { lab } = made;
      const index = 2;
      const { listener, frontend } = await lab.connect(index);
      using _listener = listener;
      using _first = frontend;
      await frontend.negotiate();
      await frontend.setupMemory(MEMORY);
      await sendBegin({ frontend });
      await lab.dieAndRevive((keeper) => rewrite(keeper, `vf/${lab.vfAt(index)}`, withoutMemory));
      await frontend.hungUp();
      using next = await listener.accept();
      await next.negotiate();
      await next.setupMemory(MEMORY);
      await next.startQueues(1);
      await lab.vfIs("running", index);
      await lab.removeVf(index);
      await made.end();
    }),
  60_000,
);

test(
  "the same in a migration: the guest stands still and all pages are marked before the connection ends",
  () =>
    FallbackLab.with(async (made) => {
      const { lab, guest } = made;
      const log = await guest.log();
      log.take();
      await sendBegin(guest);
      await lab.dieAndRevive(async () => {});
      // Its VMM looks only when it has been told: pages are what it looks for until then.
      const all = Array.from({ length: guest.frontend.memory.end / LOG_PAGE }, (_, page) => page);
      const marked = new Set<number>();
      await Deadline.after(20_000, "all pages to be marked").poll(() => {
        for (const page of log.take()) marked.add(page);
        return marked.size === all.length || undefined;
      }, 20);
      expect([...marked].toSorted((a, b) => a - b)).toEqual(all);
      await guest.frontend.hungUp();
      // It does nothing any more, which nobody would look for.
      const { done } = guest;
      await Bun.sleep(100);
      expect(guest.done).toBe(done);
      await guest.meetNext();
      await made.end();
    }),
  60_000,
);
