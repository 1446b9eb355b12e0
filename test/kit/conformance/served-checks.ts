import { Deadline } from "../../../src/base/deadline.ts";
import { liveFds } from "../../../src/native/fd.ts";
import { Request } from "../../../src/vhost-user/messages.ts";
import { configSize, configValues } from "../../../src/virtio/config-space.ts";
import type { VhostUserFrontend } from "../frontend/frontend.ts";
import { holdings } from "../fuzz/holdings.ts";
import { MOVERS } from "../movers.ts";
import { RegistryLab } from "../registry-lab.ts";
import { leftOpen, openDescriptors } from "./descriptors.ts";
import { checkOffered } from "./feature-checks.ts";
import { calling, demand } from "./holds.ts";
import { type Check, configuredPlugins, type LoadedSubject, softClass } from "./subject.ts";

/** Bytes behind each ring. */
const BUFFER_SPACE = 1 << 18;
const SESSIONS = 2;
/** Milliseconds. */
const REST_TIMEOUT = 10_000;
const EXERCISE_TIMEOUT = 10_000;

type Mover = (typeof MOVERS)[number];

/** The class in the daemon, its device in vfe-softvf, and our own front-end: with each way to move the VF's state. */
export const SERVED_CHECKS: readonly Check[] = MOVERS.flatMap((mover) => [
  {
    name: `a front-end is offered its features and configuration, moved by ${mover.mover}`,
    of: "software device" as const,
    run: (subject: LoadedSubject) => isOffered(subject, mover),
  },
  {
    name: `its queues start, stop and go on, and a hang-up leaves nothing, moved by ${mover.mover}`,
    of: "software device" as const,
    run: (subject: LoadedSubject) => startsAndStops(subject, mover),
  },
]);

async function makeLab(subject: LoadedSubject, { mover, migration }: Mover): Promise<RegistryLab> {
  softClass(subject);
  const { deviceClass, softvf = [] } = subject;
  const plugins = configuredPlugins(subject);
  const lab = await RegistryLab.create({ migration, vfs: 1, className: deviceClass.name, plugins, softvf });
  try {
    await lab.registry.addPf(lab.pf);
    await lab.serve();
    const { class: name, mover: chosen, unmanaged_reason: reason } = lab.registry.vfInfo(lab.vf);
    demand(name === deviceClass.name, `the daemon takes its VF for one of class ${name}`);
    const expected = deviceClass.adminQueue === undefined ? "registers" : mover;
    demand(chosen === expected, `the state of its VF is moved by ${chosen}, expected ${expected}: ${reason}`);
    return lab;
  } catch (error) {
    await lab[Symbol.asyncDispose]();
    throw error;
  }
}

async function isOffered(subject: LoadedSubject, mover: Mover): Promise<void> {
  const { deviceClass } = subject;
  const { configSpace } = deviceClass;
  await using lab = await makeLab(subject, mover);
  using frontend = lab.dial();
  await frontend.negotiate();
  const info = lab.registry.vfInfo(lab.vf);
  const offered = await frontend.askU64(Request.GET_FEATURES);
  checkOffered(subject, info.device_feature, offered, mover.mover === "vendor");

  const size = configSize(configSpace);
  const whole = (await frontend.getConfig(0, size)) ?? null;
  demand(whole !== null, `GET_CONFIG of all ${size} bytes of configSpace is refused`);
  demand(whole.length === size, `GET_CONFIG of ${size} bytes is answered with ${whole.length}`);
  for (const offset of [0, size >> 1, Math.max(0, size - 1)]) {
    const rest = await frontend.getConfig(offset, size - offset);
    demand(Bun.deepEquals(rest, whole.subarray(offset)), `GET_CONFIG at ${offset} answers other bytes than at 0`);
  }
  for (const [offset, length] of [
    [0, size + 1],
    [size, 1],
    [0xffff_fff0, 16],
  ] as const) {
    const beyond = await frontend.getConfig(offset, length);
    demand(beyond === undefined, `GET_CONFIG of ${length} bytes at ${offset} is answered, there are ${size}`);
  }

  const config = configValues(configSpace, whole);
  const queues = calling("queues()", () => deviceClass.queues(config, info.device_feature));
  const told = Number(await frontend.askU64(Request.GET_QUEUE_NUM));
  const counted = calling("countedQueues()", () => deviceClass.countedQueues?.(queues)) ?? queues;
  demand(told === counted, `GET_QUEUE_NUM answers ${told} where there are ${queues} queues, must be ${counted}`);
  const shown = deviceClass.describe?.(config, info.device_feature) ?? {};
  demand(
    Bun.deepEquals(info.config, shown),
    `"vf -i" shows ${Bun.inspect(info.config)}, describe() of what the front-end reads is ${Bun.inspect(shown)}`,
  );
}

async function startsAndStops(subject: LoadedSubject, mover: Mover): Promise<void> {
  await using lab = await makeLab(subject, mover);
  const settled = () => holdings(lab.softvf.pid, Deadline.after(REST_TIMEOUT, "rest of vfe-softvf"));
  // What is made with the first session stays.
  await useAll(subject, lab);
  const [live, ours, theirs] = [liveFds(), openDescriptors(), await settled()];
  for (let session = 0; session < SESSIONS; session++) await useAll(subject, lab);
  const left = await leftOpen(ours);
  demand(left.length === 0, `sessions leave open in the daemon: ${left.join(", ")}`);
  demand(liveFds() === live, `the daemon owns ${liveFds()} descriptors after some sessions, ${live} before`);
  const after = await settled();
  demand(
    Bun.deepEquals(after, theirs),
    `vfe-softvf holds ${Bun.inspect(after)} after some sessions, ${Bun.inspect(theirs)} before`,
  );
  await lab.registry.removeVf(lab.vf);
  await lab.registry.removePf(lab.pf);
}

/** One guest, from its connection to its sudden death. */
async function useAll(subject: LoadedSubject, lab: RegistryLab): Promise<void> {
  const frontend = lab.dial();
  try {
    await runAll(subject, lab, frontend);
  } finally {
    frontend[Symbol.dispose]();
  }
  await lab.idle();
}

async function runAll(subject: LoadedSubject, lab: RegistryLab, frontend: VhostUserFrontend): Promise<void> {
  await frontend.negotiate();
  await frontend.setupMemory([
    { gpa: 0, size: 8 << 20 },
    { gpa: 2 ** 32, size: 64 << 20 },
  ]);
  await frontend.startQueues(lab.registry.vfInfo(lab.vf).queue_num, { bufferSpace: BUFFER_SPACE });
  for (const order of ["new", "old"] as const) {
    await lab.running();
    await exercise(subject, lab, frontend);
    await frontend.resumeQueues(await frontend.stop({ order }));
  }
  await lab.running();
  await exercise(subject, lab, frontend);
}

/** The guest uses its queues; a device that fails meanwhile would let it wait for ever. */
async function exercise(subject: LoadedSubject, lab: RegistryLab, frontend: VhostUserFrontend): Promise<void> {
  const state = { done: false };
  const work = Promise.resolve(subject.exercise?.(frontend)).finally(() => {
    state.done = true;
  });
  const deadline = Deadline.after(EXERCISE_TIMEOUT, "use of the queues");
  const watched = deadline.poll(() => {
    const { reason } = lab.registry.vfInfo(lab.vf);
    demand(reason === null, `the VF is in trouble while its queues are used: ${reason}`);
    return state.done || undefined;
  }, 5);
  await Promise.all([work, watched]);
}
