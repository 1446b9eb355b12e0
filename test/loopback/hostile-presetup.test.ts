import { expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import { liveFds } from "../../src/native/fd.ts";
import { PRESETUP_BEGIN, PRESETUP_END, Request } from "../../src/vhost-user/messages.ts";
import { DriverRing } from "../kit/driver-ring.ts";
import { type RingSetup, u64, type VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { presetup } from "../kit/frontend/migration-messages.ts";
import { RegistryLab } from "../kit/registry-lab.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";

/** A front-end that sets up early, and oddly, harms its own VF at most, and leaves nothing behind. */

const SIZE = 64;
const NO_FD = 0x100n;
const REGIONS = [
  { gpa: 0, size: 8 << 20 },
  { gpa: 2 ** 32, size: 32 << 20 },
] as const;

const say = (frontend: VhostUserFrontend, what: bigint) => frontend.command(Request.PRESETUP, u64(what));

/** A ring in its memory, which nobody has handed over. */
function ringIn({ memory, features }: VhostUserFrontend): RingSetup {
  const base = REGIONS[1].gpa;
  const ring = new DriverRing({ memory, base, size: SIZE, features, bufferSpace: 1 << 16, firstIndex: 0 });
  return { index: 0, driver: { ring } };
}

async function early(frontend: VhostUserFrontend, base = 0): Promise<void> {
  await presetup(frontend, [ringIn(frontend)], { bases: [base] });
}

async function runs(lab: RegistryLab, frontend: VhostUserFrontend): Promise<void> {
  await frontend.startQueues(1);
  await lab.running();
  await new VerifiedDisk(64, 32).runOn(frontend.queues[0]!.driver, 4).progress(20);
}

/** Hangs up instead of sending the message of this number. */
function hangUpAt(frontend: VhostUserFrontend, number: number): void {
  const command = frontend.command.bind(frontend);
  let left = number;
  frontend.command = async (...message) => {
    if (left-- === 0) throw new Error("hung up");
    return await command(...message);
  };
}

test("however a front-end sets up early, other VFs go on, and so does the next front-end", async () => {
  await using lab = await RegistryLab.create();
  await lab.registry.addPf(lab.pf);
  using other = await lab.connect(lab.vf2, "other.sock");
  await lab.run(other);
  const io = new VerifiedDisk(0, 32).runOn(other.queues[0]!.driver, 4);
  const socket = lab.socket(`${lab.vf}.sock`);
  await lab.registry.addVf({ address: lab.vf, socket, mode: "server", frontend: "nvidia-presetup" });
  const before = liveFds();
  const ways: ((frontend: VhostUserFrontend) => Promise<unknown>)[] = [
    (frontend) => early(frontend, 0xffff),
    async (frontend) => {
      await early(frontend);
      for (let base = 0; base < 50; base++) {
        await say(frontend, PRESETUP_BEGIN);
        await frontend.setupRing(ringIn(frontend), base);
        await frontend.command(Request.SET_VRING_KICK, u64(NO_FD));
        await say(frontend, PRESETUP_END);
      }
      await runs(lab, frontend);
    },
    async (frontend) => {
      await early(frontend);
      await frontend.setMemTable([]);
      await frontend.setMemTable();
      await runs(lab, frontend);
    },
    async (frontend) => {
      await say(frontend, PRESETUP_BEGIN);
      await say(frontend, PRESETUP_BEGIN);
    },
    (frontend) => say(frontend, PRESETUP_END),
    ...Array.from({ length: 12 }, (_, number) => async (frontend: VhostUserFrontend) => {
      hangUpAt(frontend, number);
      await early(frontend);
    }),
    async (frontend) => {
      await early(frontend);
      await runs(lab, frontend);
    },
  ];
  const outcomes: string[] = [];
  for (const way of ways) {
    using frontend = lab.dial();
    await frontend.negotiate();
    for (const { gpa, size } of REGIONS) frontend.memory.add(gpa, size);
    const tried = way(frontend).then(
      () => "well",
      (error: unknown) => (error instanceof Error ? error.message : `${error}`),
    );
    outcomes.push(await Deadline.after(10_000, "an early set-up").race(tried));
    frontend.channel[Symbol.dispose]();
    await lab.idle();
    await io.progress(20);
    expect(await lab.registry.moveVf(lab.vf, "status")).toBe("init");
    expect(await lab.registry.moveVf(lab.vf2, "status")).toBe("running");
  }
  expect(outcomes.slice(0, 3)).toEqual(["well", "well", "well"]);
  expect(outcomes.slice(3, 5)).toEqual(Array(2).fill("no answer to request 41: hung up"));
  expect(outcomes[5]).toBe("hung up");
  expect(outcomes.at(-1)).toBe("well");
  await Deadline.after(10_000, "files to be closed").poll(() => liveFds() === before || undefined, 1);
  await io.stop();
}, 60_000);
