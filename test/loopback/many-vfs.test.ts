import { expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { Deadline } from "../../src/base/deadline.ts";
import type { RpcClient } from "../../src/rpc/client.ts";
import { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import type { Child } from "../kit/guest/child.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";
import { Machine, startDisk } from "./session-machine.ts";

/** As many VFs as a busy machine has, added and removed again and again: the daemon and vfe-softvf, two processes. */

const VFS = 256;
const ACTIVE = 32;
const ROUNDS = 10;
/** Rounds after which the heaps have the size that they need. */
const WARM_UP = 2;
/** The collectors believe that there is little memory, so that what is garbage does not stay long. Bytes. */
const SMALL_HEAPS = { BUN_JSC_forceRAMSize: "100000000" };
/** Heaps rise and fall with their collectors: the lowest of so many rounds is looked at. */
const WINDOW = 3;
/** KiB: 16 per VF and round. A mapping that is left behind is one per VF and round. */
const RSS_GROWTH_MAX = (ROUNDS - WARM_UP - WINDOW) * VFS * 16;
const MAPS_GROWTH_MAX = VFS / 4;
const REQUESTS = 10;
/** Milliseconds for all calls of one kind in a round. */
const CALL_TIMEOUT = 20_000;

interface Holdings {
  readonly fds: number;
  /** Files of shared memory that are mapped. */
  readonly memoryMaps: number;
  readonly maps: number;
  /** KiB. */
  readonly rss: number;
}

function holdings({ pid }: Child): Holdings {
  const maps = readFileSync(`/proc/${pid}/maps`, "utf8").trimEnd().split("\n");
  const [, rss] = /^VmRSS:\s+(\d+) kB/m.exec(readFileSync(`/proc/${pid}/status`, "utf8")) ?? [];
  return {
    fds: readdirSync(`/proc/${pid}/fd`).length,
    memoryMaps: maps.filter((line) => line.includes("memfd:")).length,
    maps: maps.length,
    rss: Number(rss),
  };
}

async function round(machine: Machine, client: RpcClient, number: number): Promise<void> {
  const all = Array.from({ length: VFS }, (_, vf) => vf);
  const call = (method: string, params: Record<string, unknown>) =>
    client.call(method, params, Deadline.after(CALL_TIMEOUT, method));
  const device = (vf: number) => machine.address(vf);
  await Promise.all(
    all.map((vf) => call("vf.add", { device: device(vf), socket: machine.socket(vf), mode: "server" })),
  );
  const { vfs: listed } = (await call("vf.list", { pf: machine.pf })) as {
    vfs: { vf: string; state: string; managed: boolean }[];
  };
  expect(listed.map(({ vf }) => vf).toSorted()).toEqual(all.map(device).toSorted());
  expect(listed.every(({ state, managed }) => state === "idle" && managed)).toBeTrue();

  using frontends = new DisposableStack();
  const active = all.filter((vf) => vf % (VFS / ACTIVE) === number % (VFS / ACTIVE));
  expect(active).toHaveLength(ACTIVE);
  const running = await Promise.all(
    active.map(async (vf) => {
      const frontend = frontends.use(VhostUserFrontend.connect(machine.socket(vf)));
      await startDisk(frontend, 1);
      return frontend;
    }),
  );
  await Promise.all(running.map(({ queues }) => new VerifiedDisk().steps(queues[0]!.driver, REQUESTS)));
  // Half of the front-ends are there when their VF goes, half have gone before.
  for (const frontend of running.slice(0, ACTIVE / 2)) frontend[Symbol.dispose]();
  await Promise.all(all.map((vf) => call("vf.remove", { device: device(vf) })));
  expect(await call("vf.list", { pf: machine.pf })).toEqual({ vfs: [], left: [] });
}

test(`${VFS} VFs, ${ACTIVE} of them in use at once, ${ROUNDS} times: nothing grows`, async () => {
  await using machine = await Machine.start({ vfs: VFS, queues: 1, environment: SMALL_HEAPS });
  const seen: { daemon: Holdings; softvf: Holdings }[] = [];
  for (let number = 0; number < ROUNDS; number++) {
    using client = await machine.client();
    await round(machine, client, number);
    client[Symbol.dispose]();
    await machine.steadyFds([]);
    seen.push({ daemon: holdings(machine.daemon), softvf: holdings(machine.softvf) });
  }
  for (const program of ["daemon", "softvf"] as const) {
    const own = seen.map((round) => round[program]);
    const lowest = (rounds: readonly Holdings[], what: "rss" | "maps") =>
      Math.min(...rounds.slice(0, WINDOW).map((holding) => holding[what]));
    const [warm, last] = [own.slice(WARM_UP), own.slice(-WINDOW)];
    expect(own.map(({ fds }) => fds)).toEqual(own.map(() => own[0]!.fds));
    expect(own.map(({ memoryMaps }) => memoryMaps)).toEqual(own.map(() => own[0]!.memoryMaps));
    expect(lowest(last, "maps") - lowest(warm, "maps")).toBeLessThan(MAPS_GROWTH_MAX);
    expect(lowest(last, "rss") - lowest(warm, "rss")).toBeLessThan(RSS_GROWTH_MAX);
  }
}, 120_000);
