import { expect, test } from "bun:test";
import fc from "fast-check";
import { Deadline } from "../../src/base/deadline.ts";
import { VhostdError } from "../../src/base/errors.ts";
import { liveFds } from "../../src/native/fd.ts";
import { InternalStatus, type InternalStatusName } from "../../src/virtio/admin/vendor.ts";
import type { VendorAdmin } from "../../src/virtio/admin/vendor-admin.ts";
import { deathOf, FakeAdmin, type FakeAnswer } from "../kit/fake-admin.ts";
import { FUZZ_TIMEOUT, fuzz } from "../kit/fuzz.ts";

/** Milliseconds for each command, and for the sign of life that decides whether the queue is dead. */
const COMMAND_TIME = 30;
const LIFE_SIGN = 30;
/** The same where the device is to be believed: a busy machine is slow. */
const HONEST_TIME = 10_000;
/** Beyond the deadline: a busy machine's timers are late. */
const GRACE = 3_000;
const VFS = 3;

/** How the device treats a command. */
const treatment = fc.oneof(
  { weight: 6, arbitrary: fc.constant({ kind: "honest" as const }) },
  { weight: 1, arbitrary: fc.constant({ kind: "silence" as const }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant("late" as const), milliseconds: fc.nat(50) }) },
  {
    weight: 3,
    arbitrary: fc.record({
      kind: fc.constant("garbage" as const),
      status: fc.oneof(fc.constantFrom(0, 0, 1, 0x81, 0xff), fc.nat(255)),
      result: fc.oneof(
        fc.uint8Array({ maxLength: 64 }),
        fc.bigInt({ min: 0n, max: (1n << 64n) - 1n }).map((value) => new Uint8Array(BigUint64Array.of(value).buffer)),
      ),
    }),
  },
  {
    weight: 1,
    arbitrary: fc.record({
      kind: fc.constant("ring" as const),
      id: fc.oneof(fc.nat(40), fc.nat(0xffff_ffff)),
      length: fc.nat(0xffff_ffff),
    }),
  },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant("index" as const), value: fc.nat(0xffff) }) },
  { weight: 1, arbitrary: fc.constant({ kind: "twice" as const }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant("shrink" as const), size: fc.nat(0x4000) }) },
);
type Treatment = typeof treatment extends fc.Arbitrary<infer T> ? T : never;

const operation = fc.tuple(fc.constantFrom("identity", "status", "quiesce", "freeze", "pending", "save"), fc.nat(VFS));

function start(admin: VendorAdmin, what: string, vdevId: number, deadline: Deadline): Promise<unknown> {
  switch (what) {
    case "identity":
      return admin.identity(deadline);
    case "status":
      return admin.status(vdevId, deadline);
    case "quiesce":
      return admin.modify(vdevId, "quiesced", deadline);
    case "freeze":
      return admin.modify(vdevId, "freezed", deadline);
    case "pending":
      return admin.pendingBytes(vdevId, deadline);
    default:
      return admin.save(vdevId, deadline);
  }
}

/** Devices whose queue is gone. */
const closed = new WeakSet<FakeAdmin>();

/** The device's part: each command in turn is treated as the list says, those beyond its end honestly. */
function lie(fake: FakeAdmin, treatments: readonly Treatment[]): void {
  const left = [...treatments];
  fake.answer = async (command): Promise<FakeAnswer> => {
    const how = left.shift() ?? { kind: "honest" };
    switch (how.kind) {
      case "silence":
        return "silence";
      case "late":
        await Bun.sleep(how.milliseconds);
        return fake.honest(command);
      case "garbage":
        return { status: how.status, result: how.result };
      case "ring":
        fake.complete(how.id, how.length);
        return fake.honest(command);
      case "index":
        fake.setUsedIndex(how.value);
        return "silence";
      case "twice":
        fake.complete(command.head);
        return fake.honest(command);
      case "shrink":
        // From then on it reads nothing there: what it would find is no ring any more.
        fake.fn.onRing = () => {};
        setImmediate(() => {
          if (!closed.has(fake)) fake.shrinkMemory(how.size);
        });
        return "silence";
      default:
        return fake.honest(command);
    }
  };
}

/** A device that only answers late, wrongly or not at all leaves the ring as it is: what is asked later is answered. */
const HARMLESS = ["honest", "silence", "late", "garbage"];
/** Every way for a command to end badly. What is not among them is a mistake of ours. */
const OUTCOMES = ["timedOut", "adminQueue", "busy", "io", "stateSave", "quiesceFailed", "freezeFailed"];
const STATUSES = Object.keys(InternalStatus) as InternalStatusName[];

/** One command, from its start to its end. @returns "done", or the code of its error */
async function outcome(admin: VendorAdmin, what: string, vdevId: number, time = COMMAND_TIME): Promise<string> {
  const promise = start(admin, what, vdevId, Deadline.after(time, what));
  try {
    const result = await Deadline.after(time + GRACE, `the outcome of ${what}`).race(promise);
    if (what === "status") expect(STATUSES).toContain(result as InternalStatusName);
    if (what === "identity") expect(result).toMatch(time === HONEST_TIME ? /^1\.0\.0$/ : /^\d+\.\d+\.\d+$/);
    return "done";
  } catch (error) {
    if (!(error instanceof VhostdError)) throw error;
    expect(OUTCOMES).toContain(error.code);
    expect(error.message).not.toStartWith("the outcome of");
    return error.code;
  }
}

test(
  "whatever a PF answers, each command ends in time with a stated outcome, and the queue works or is dead",
  async () => {
    const round = fc.array(operation, { minLength: 1, maxLength: 40 });
    const property = fc.asyncProperty(
      fc.array(round, { minLength: 1, maxLength: 3 }),
      fc.array(treatment, { maxLength: 60 }),
      fc.boolean(),
      async (rounds, treatments, interrupts) => {
        const before = liveFds();
        const honest = treatments.every(({ kind }) => kind === "honest");
        const harmless = treatments.every(({ kind }) => HARMLESS.includes(kind));
        const time = honest ? HONEST_TIME : COMMAND_TIME;
        {
          await using fake = new FakeAdmin({ vfs: VFS, timeouts: { lifeSign: honest ? HONEST_TIME : LIFE_SIGN } });
          using _gone = { [Symbol.dispose]: () => void closed.add(fake) };
          fake.interrupts = interrupts;
          const admin = await fake.open();
          lie(fake, treatments);
          for (const operations of rounds) {
            await Promise.all(operations.map(([what, vdevId]) => outcome(admin, what, vdevId, time)));
          }
          // From here on the device is honest. A queue that lives serves every VF that did not lose too much.
          fake.answer = (command) => fake.honest(command);
          for (let vdevId = 1; vdevId <= VFS; vdevId++) {
            const last = await outcome(admin, "status", vdevId, harmless ? HONEST_TIME : COMMAND_TIME);
            if (deathOf(admin) !== undefined) expect(await outcome(admin, "status", vdevId)).toBe("adminQueue");
            // "busy": too many commands of this VF were lost.
            else expect(harmless ? ["done", "busy"] : ["done", "busy", "io"]).toContain(last);
          }
          if (honest) expect(deathOf(admin)).toBeUndefined();
          else expect(deathOf(admin)).not.toBe("");
        }
        expect(liveFds()).toBe(before);
      },
    );
    await fuzz("admin queue of a lying device", property, { batch: 10 });
  },
  FUZZ_TIMEOUT,
);
