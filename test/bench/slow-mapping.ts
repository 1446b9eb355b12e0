import { Deadline } from "../../src/base/deadline.ts";
import type { OwnedFd } from "../../src/native/fd.ts";
import { connectUnix } from "../../src/native/sys.ts";
import { Request } from "../../src/vhost-user/messages.ts";
import { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { RegistryLab } from "../kit/registry-lab.ts";
import { SlowMapping } from "../kit/slow-mapping.ts";

const GIB = 2 ** 30;
const BIG = { gpa: 2 ** 33, size: 64 * GIB };
const SMALL = [
  { gpa: 0, size: 8 << 20 },
  { gpa: 2 ** 32, size: 32 << 20 },
];
/** Milliseconds that a gibibyte takes: what the kernel needs for pages of 4 KiB that it has to make. */
const TIME_PER_GIB = 60;
const RUNS = 5;
/** Sessions until the code is compiled. */
const WARM_UP = 60;

/** Milliseconds that each request of sessions took, by the request's number. */
type Times = Map<number, number[]>;

/**
 * While 64 GiB are mapped for the guest of one VF, another VF has sessions, one after the other.
 * @returns of each run, by how many milliseconds one of their requests waited longer than any did in the same time without
 * the mapping. A wait is what a request took beyond the median of its kind: other programs of the machine cause some, too.
 */
export async function slowMapping(): Promise<number[]> {
  const runs: number[] = [];
  using mapping = new SlowMapping(RUNS * BIG.size, TIME_PER_GIB);
  await using lab = await RegistryLab.create({ vfs: 2, spaces: (_, owner) => mapping.space(owner) });
  await lab.registry.addPf(lab.pf);
  for (const vf of [lab.vf, lab.vf2]) await lab.serve(vf);
  for (let at = 0; at < WARM_UP; at++) await session(lab, new Map());
  for (let run = 0; run < RUNS; run++) {
    const usual: Times = new Map();
    const quiet = Deadline.after((BIG.size / GIB) * TIME_PER_GIB, "the time in which nothing is mapped");
    while (!quiet.expired) await session(lab, usual);
    const meanwhile = await duringMapping(lab);
    runs.push(Math.max(0, longestWait(meanwhile, usual) - longestWait(usual, usual)));
  }
  return runs;
}

async function duringMapping(lab: RegistryLab): Promise<Times> {
  const times: Times = new Map();
  using big = lab.dial(lab.vf2);
  await big.negotiate();
  big.memory.add(BIG.gpa, BIG.size);
  let mapped = false;
  const mapping = big.setMemTable().finally(() => {
    mapped = true;
  });
  while (!mapped) await session(lab, times);
  if ((await mapping) !== 0n) throw new Error("the big memory was not mapped");
  big[Symbol.dispose]();
  await lab.idle(lab.vf2);
  return times;
}

/** One session of the other VF, from connect to stop. */
async function session(lab: RegistryLab, times: Times): Promise<void> {
  await lab.idle();
  using frontend = new TimedFrontend(connectUnix(lab.socket(`${lab.vf}.sock`)), times);
  await frontend.negotiate();
  await frontend.setupMemory(SMALL);
  await frontend.startQueues(1);
  await frontend.stop({ order: "new" });
}

class TimedFrontend extends VhostUserFrontend {
  constructor(
    fd: OwnedFd,
    private readonly times: Times,
  ) {
    super(fd);
  }

  override ask(...words: Parameters<VhostUserFrontend["ask"]>): Promise<Uint8Array> {
    return this.timed(words[0], () => super.ask(...words));
  }

  override command(...words: Parameters<VhostUserFrontend["command"]>): Promise<bigint> {
    return this.timed(words[0], () => super.command(...words));
  }

  private async timed<T>(request: number, send: () => Promise<T>): Promise<T> {
    const begin = performance.now();
    const answer = await send();
    const known = this.times.get(request) ?? [];
    this.times.set(request, known);
    known.push(performance.now() - begin);
    return answer;
  }
}

function longestWait(times: Times, usual: Times): number {
  if (!times.has(Request.SET_STATUS)) throw new Error("there was no session");
  const waits = [...times].map(([request, seen]) => {
    const known = (usual.get(request) ?? []).toSorted((a, b) => a - b);
    return Math.max(...seen) - known[known.length >> 1]!;
  });
  return Math.max(...waits);
}
