import { Request } from "../../src/vhost-user/messages.ts";
import { u64, VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { InstalledMachine } from "./installed.ts";

const ROUNDS = 9;
/** Of a round. */
const MESSAGES = 400;
/** Rounds until the code of three processes is compiled. */
const WARM_UP = 4;
/** A queue of the smallest size, and nothing behind it. */
const RING = { size: 4, bufferSpace: 4096 };
const MEMORY = 16 << 20;

/** Microseconds. */
export interface MessageCosts {
  /** Of a message that gives another call eventfd, as they come while a guest runs: one fd of the record changes. */
  readonly fd: readonly number[];
  /** Of one that gives another kick, for which the record is written as a whole. */
  readonly whole: readonly number[];
  /** Of one that changes nothing. */
  readonly asking: readonly number[];
}

/**
 * What a keeper adds to a message and its answer, by two daemons that take turns, one with a keeper and one without: medians.
 * @param queues of the VF, all of them in use
 */
export async function keeperCosts(queues: number): Promise<MessageCosts> {
  await using kept = await Place.start(queues, true);
  await using alone = await Place.start(queues, false);
  const costs = { fd: [] as number[], whole: [] as number[], asking: [] as number[] };
  for (let round = 0; round < WARM_UP + ROUNDS; round++) {
    for (const kind of ["fd", "whole", "asking"] as const) {
      const cost = (await kept[kind]()) - (await alone[kind]());
      if (round >= WARM_UP) costs[kind].push(cost);
    }
  }
  return costs;
}

/** A daemon with a VF that runs, and its front-end. */
class Place implements AsyncDisposable {
  private constructor(
    private readonly machine: InstalledMachine,
    private readonly frontend: VhostUserFrontend,
  ) {}

  static async start(queues: number, keeper: boolean): Promise<Place> {
    await using undo = new AsyncDisposableStack();
    const machine = undo.use(await InstalledMachine.start(1, { queues, keeper }));
    await machine.addVf(0, "server");
    const frontend = undo.use(VhostUserFrontend.connect(machine.socket(0)));
    await frontend.negotiate();
    await frontend.setupMemory([{ gpa: 0, size: MEMORY }]);
    await frontend.startQueues(queues, RING);
    undo.move();
    return new Place(machine, frontend);
  }

  async fd(): Promise<number> {
    const { frontend } = this;
    return await middle(async (at) => {
      const { index, driver } = frontend.queues[at % frontend.queues.length]!;
      await frontend.answered(Request.SET_VRING_CALL, u64(BigInt(index)), [driver.call.number]);
    });
  }

  async whole(): Promise<number> {
    const { frontend } = this;
    return await middle(async (at) => {
      const { index, kick } = frontend.queues[at % frontend.queues.length]!;
      await frontend.answered(Request.SET_VRING_KICK, u64(BigInt(index)), [kick.number]);
    });
  }

  async asking(): Promise<number> {
    return await middle(async () => void (await this.frontend.ask(Request.GET_FEATURES)));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.frontend[Symbol.dispose]();
    await this.machine[Symbol.asyncDispose]();
  }
}

/** The median of what each took, microseconds. */
async function middle(work: (at: number) => Promise<void>): Promise<number> {
  const times: number[] = [];
  for (let at = 0; at < MESSAGES; at++) {
    const begin = performance.now();
    await work(at);
    times.push(performance.now() - begin);
  }
  return times.sort((a, b) => a - b)[MESSAGES / 2]! * 1000;
}
