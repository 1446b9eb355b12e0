import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { VhostdError } from "../../src/base/errors.ts";
import { liveFds } from "../../src/native/fd.ts";
import type { PciAddress } from "../../src/pci/address.ts";
import { usedIndex } from "../../src/virtio/split-ring.ts";
import type { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { LonelyGuest } from "../kit/frontend/hang-up.ts";
import { RegistryLab } from "../kit/registry-lab.ts";
import { rejection } from "../kit/rejection.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";

/** Each admin command fails, fails for now, or is never answered, whenever the daemon needs it. */

/** Milliseconds; a command that may be tried again is, once a second. */
const DEADLINES = { admin: 2_500, start: 2_500, drain: 2_500, reset: 2_000, detach: 2_000 };
/** Blocks of the disk that one VF has for itself. */
const RANGE = 32;

const FAULTS = ["retry", "retry:1", "fail", "silence"] as const;
type Fault = (typeof FAULTS)[number];
/** Commands on a VF, by the words of --admin-fault and as errors name them. */
const COMMANDS = {
  status: "getStatus",
  modify: "modifyStatus",
  pending: "pendingBytes",
  save: "save",
  restore: "restore",
} as const;
type Command = keyof typeof COMMANDS;

/** What needs which commands. */
const MOMENTS = {
  start: ["modify", "restore"],
  stop: ["status", "modify", "pending", "save"],
  hangUp: ["modify", "pending", "save"],
} as const satisfies Readonly<Record<string, readonly Command[]>>;
type Moment = keyof typeof MOMENTS;

interface Case {
  readonly vf: number;
  readonly moment: Moment;
  readonly command: Command;
  readonly fault: Fault;
}

const CASES: readonly Case[] = Object.keys(MOMENTS)
  .flatMap((moment) =>
    Object.keys(COMMANDS).map((command) => ({ moment, command }) as Pick<Case, "moment" | "command">),
  )
  .flatMap((each) => FAULTS.map((fault) => ({ ...each, fault })))
  .map((each, vf) => ({ ...each, vf }));
const BYSTANDER = CASES.length;
const RESTLESS = CASES.length + 1;

/** What an error says of the fault; one that goes away when the command is tried again is no error. */
const SAYS: Readonly<Record<Exclude<Fault, "retry:1">, (command: string, vf: number) => string>> = {
  retry: (command, vf) => `refused ${command} of virtfn${vf}: error (code 1), also after`,
  fail: (command, vf) => `refused ${command} of virtfn${vf}: internal (code 5)`,
  silence: (command, vf) => `did not answer ${command} of virtfn${vf}`,
};

let lab: RegistryLab;
const addVf = (vf: number) => lab.serve(lab.vfAt(vf));
const dial = (vf: number) => lab.dial(lab.vfAt(vf));
const idle = (vf: number) => lab.idle(lab.vfAt(vf));
const info = (vf: number) => lab.registry.vfInfo(lab.vfAt(vf));
const disk = (vf: number) => new VerifiedDisk(vf * RANGE, RANGE);

/** A guest of one VF, idle between the steps. */
class Guest implements Disposable {
  private readonly disk: VerifiedDisk;
  private frontend: VhostUserFrontend | undefined;
  private lonely: LonelyGuest | undefined;

  constructor(private readonly vf: number) {
    this.disk = disk(vf);
  }

  async start(base = 0xfffe): Promise<void> {
    this.frontend = dial(this.vf);
    await lab.run(this.frontend, 1, base);
    await this.work();
  }

  async work(): Promise<void> {
    await this.disk.steps(this.frontend!.queues[0]!.driver, 3);
  }

  async stop(): Promise<void> {
    const bases = await this.frontend!.stop({ order: "new" });
    const { memory, queues } = this.frontend!;
    expect(bases).toEqual([usedIndex(memory, queues[0]!.driver.ring)]);
    await this.frontend!.resumeQueues(bases);
    await this.work();
  }

  async hangUp(): Promise<void> {
    this.lonely = LonelyGuest.hangUp(this.frontend!);
    await idle(this.vf);
  }

  async return(): Promise<void> {
    this.frontend = dial(this.vf);
    await this.lonely!.meet(this.frontend);
    await this.work();
  }

  async hungUp(): Promise<void> {
    await this.frontend!.hungUp();
    await idle(this.vf);
  }

  [Symbol.dispose](): void {
    this.frontend?.[Symbol.dispose]();
    this.lonely?.[Symbol.dispose]();
  }
}

/** What an error of this case says, one of these, or undefined where all goes well. */
function expected({ vf, moment, command, fault }: Case): readonly string[] | undefined {
  const needed: readonly Command[] = MOMENTS[moment];
  // It is stopped by its registers then, and goes on.
  if (moment === "stop" && command === "modify" && fault === "silence") return undefined;
  if (fault === "retry:1" || !needed.includes(command)) return undefined;
  const said = SAYS[fault](COMMANDS[command], vf);
  // Where its turn to stand by comes before the start, that is not answered, and this guest begins where registers cannot.
  const stoodBy = moment === "start" && command === "modify" && fault === "silence";
  return stoodBy ? [said, `has not answered an earlier command that may still alter virtfn${vf}`] : [said];
}

/** Whether the device still has a command that may alter the VF. */
function unsettled({ moment, command, fault }: Case): boolean {
  const needed: readonly Command[] = MOMENTS[moment];
  return fault === "silence" && needed.includes(command) && (command === "modify" || command === "restore");
}

describe("of one VF", () => {
  const guests = CASES.map(({ vf }) => new Guest(vf));

  beforeAll(async () => {
    lab = await RegistryLab.create({ vfs: CASES.length + 2, deadlines: DEADLINES });
    await lab.registry.addPf(lab.pf);
    await Promise.all([...CASES.keys(), BYSTANDER, RESTLESS].map(addVf));
  }, 30_000);
  afterAll(async () => {
    for (const guest of guests) guest[Symbol.dispose]();
    await lab?.[Symbol.asyncDispose]();
  });

  test("ends in what is said, in time, and no other VF notices", async () => {
    using bystander = dial(BYSTANDER);
    await lab.run(bystander);
    const io = disk(BYSTANDER).runOn(bystander.queues[0]!.driver, 4);
    await Promise.all(CASES.map(({ vf, moment }) => (moment === "start" ? undefined : guests[vf]!.start())));
    await lab.set(lab.pf, {
      "admin-fault": CASES.map(({ vf, command, fault }) => `${command}@${vf}:${fault}`).join(),
    });

    let under_way = true;
    let restarts = 0;
    using restless = new Guest(RESTLESS);
    const others = (async () => {
      await restless.start();
      for (; under_way; restarts++) {
        await restless.stop();
        await restless.hangUp();
        await restless.return();
        await io.progress(10);
      }
    })();
    const wrong = await Promise.all(CASES.map(outcome));
    under_way = false;
    await others;
    expect(restarts).toBeGreaterThan(3);
    expect(await io.stop()).toBeGreaterThan(0);
    expect(wrong.filter((text) => text !== undefined)).toEqual([]);
    expect(lab.registry.listPfs()[0]).toMatchObject({ managed: true, admin_queue: "ready", reason: null });
  }, 40_000);

  test("and is over as soon as its cause is gone", async () => {
    await lab.set(lab.pf, { "admin-fault": "" });
    await Promise.all(
      CASES.map(async (one) => {
        const { vf } = one;
        using guest = new Guest(vf);
        guests[vf]![Symbol.dispose]();
        await idle(vf);
        if (unsettled(one)) {
          await rejection(guest.start());
          await guest.hungUp();
          expect(info(vf).reason).toContain(`may still alter virtfn${vf}`);
          await guest.start(0);
          expect(info(vf)).toMatchObject({ state: "running", managed: false });
          return;
        }
        await guest.start();
        await guest.stop();
        await guest.hangUp();
        await guest.return();
        expect(info(vf)).toMatchObject({ state: "running", reason: null, managed: true });
      }),
    );
  }, 40_000);

  /** @returns what is not as it should be */
  async function outcome(one: Case): Promise<string | undefined> {
    const { vf, moment, command, fault } = one;
    const said = lab.warnings.length;
    const name = `${moment} with ${command}:${fault}`;
    const wanted = expected(one);
    let ended = false;
    try {
      await guests[vf]![moment]();
    } catch {
      ended = true;
      await guests[vf]!.hungUp();
    }
    // Nobody is there to be told when a front-end has hung up: it is in the log.
    const lines = lab.warnings.slice(said).filter((line) => line.startsWith(`vf ${lab.vfAt(vf)}: `));
    const seen = moment === "hangUp" ? (lines.length === 0 ? null : lines.join(" | ")) : info(vf).reason;
    if (ended !== (wanted !== undefined && moment !== "hangUp"))
      return `${name}: ${ended ? `failed, ${seen}` : "went well"}`;
    if (wanted === undefined) return seen === null ? undefined : `${name}: ${seen}`;
    return wanted.some((text) => seen?.includes(text)) ? undefined : `${name}: ${seen}`;
  }
});

/** The error that `action` ends in. */
async function failure(action: Promise<unknown>): Promise<VhostdError> {
  const error = await action.then(
    () => undefined,
    (thrown: unknown) => thrown,
  );
  if (!(error instanceof VhostdError)) throw new Error(`expected a VhostdError, there was ${error}`);
  return error;
}

test("an admin queue that answers nothing is dead: its VFs go on and say so, until the PF is added again", async () => {
  const fds = liveFds();
  {
    await using lab = await RegistryLab.create({ deadlines: DEADLINES });
    const { registry, pf } = lab;
    const [busy, idle, frozen, late] = [0, 1, 2, 3].map((index) => lab.vfAt(index)) as [
      PciAddress,
      PciAddress,
      PciAddress,
      PciAddress,
    ];
    await registry.addPf(pf);
    for (const vf of [busy, idle, frozen]) await lab.serve(vf);
    using first = lab.dial(busy);
    await lab.run(first, 1, 0xfff0);
    const io = disk(0).runOn(first.queues[0]!.driver, 4);
    await io.progress(20);
    using second = lab.dial(idle);
    await lab.run(second);
    using third = lab.dial(frozen);
    await lab.run(third);
    await disk(2).steps(third.queues[0]!.driver, 5);
    const [frozenAt] = await third.stop({ order: "new" });
    expect(frozenAt).toBe(5);

    const died = Promise.withResolvers<unknown>();
    using _events = registry.onEvent((event) => event.state === "admin queue dead" && died.resolve(event.reason));
    await lab.set(pf, {
      "admin-fault": ["identity", ...Object.keys(COMMANDS)].map((word) => `${word}:silence`).join(),
    });
    // Nothing is in use: its registers stop it.
    expect(await second.stop({ order: "new" })).toEqual([0]);
    second[Symbol.dispose]();
    await lab.idle(idle);
    expect(await died.promise).toContain("answers nothing any more");
    const reason = expect.stringContaining("is dead: it answers nothing any more");
    expect(registry.listPfs()).toMatchObject([{ managed: false, admin_queue: "dead", reason }]);
    for (const vf of [busy, idle, frozen]) {
      expect(registry.vfInfo(vf)).toMatchObject({ managed: false, unmanaged_reason: reason });
    }
    expect(await failure(registry.moveVf(busy, "status"))).toMatchObject({ number: 1012, message: reason });

    // The one that runs goes on, and is stopped and started by its registers.
    await io.progress(20);
    io.pause();
    const bases = await first.stop({ order: "old" });
    await first.resumeQueues(bases);
    io.resume();
    await io.progress(20);

    // The others can begin again, at index 0 only.
    await third.resumeQueues([frozenAt!]).catch(() => {});
    await third.hungUp();
    await lab.idle(frozen);
    expect(registry.vfInfo(frozen).reason).toContain("queue 0 is to resume at index 5");
    expect(registry.vfInfo(frozen).reason).toContain("can only begin at 0");
    await lab.serve(late);
    expect(registry.vfInfo(late)).toMatchObject({ managed: false, unmanaged_reason: reason });
    for (const vf of [idle, frozen, late]) {
      using frontend = lab.dial(vf);
      await lab.run(frontend);
      const own = disk(3);
      await own.steps(frontend.queues[0]!.driver, 5);
      const bases = await frontend.stop({ order: "old" });
      expect(bases).toEqual([5]);
      await frontend.resumeQueues(bases);
      await own.verifyAll(frontend.queues[0]!.driver);
    }
    await io.stop();

    await lab.set(pf, { "admin-fault": "" });
    expect(registry.listPfs()).toMatchObject([{ managed: false, admin_queue: "dead", reason }]);
    for (const vf of [busy, idle, frozen, late]) await registry.removeVf(vf);
    await registry.removePf(pf);
    expect(await registry.addPf(pf)).toMatchObject({ managed: true, admin_queue: "ready", reason: null });
    await lab.serve(frozen);
    using again = lab.dial(frozen);
    await lab.run(again, 1, 0x1234);
    await disk(2).steps(again.queues[0]!.driver, 5);
    expect(registry.vfInfo(frozen)).toMatchObject({ managed: true, unmanaged_reason: null });
  }
  expect(liveFds()).toBe(fds);
}, 30_000);
