import { readFile } from "node:fs/promises";
import { Deadline } from "../../src/base/deadline.ts";
import { VhostdError } from "../../src/base/errors.ts";
import { KeeperClient } from "../../src/keeper/keeper-client.ts";
import { keeperSocket } from "../../src/runtime-directory.ts";
import { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { InstalledMachine } from "./installed.ts";

const VFS = 1000;
const FDS = 20_000;
/** How often each record is written: what was there before is garbage. */
const WRITES = 5;
/** Milliseconds until what was only needed for a moment has been given back. */
const SETTLING = 5_000;
const TIMEOUT = 10_000;
const MEMORY = 2 << 20;
const RING = { size: 64, bufferSpace: 64 << 10 };

/** MiB that a keeper has for itself alone, with the records of many VFs and their fds. */
export async function keeperMemory(): Promise<number> {
  await using machine = await InstalledMachine.start(1, { queues: 4, keeper: true });
  await machine.addVf(0, "server");
  using frontend = VhostUserFrontend.connect(machine.socket(0));
  await frontend.negotiate();
  await frontend.setupMemory([{ gpa: 0, size: MEMORY }]);
  await frontend.startQueues(4, RING);
  await machine.daemon.kill();
  await fill(keeperSocket(machine.runtimeDirectory));
  await Bun.sleep(SETTLING);
  const rollup = await readFile(`/proc/${machine.keeper!.pid}/smaps_rollup`, "utf8");
  return Number(/^Private_Dirty:\s+(\d+) kB$/m.exec(rollup)?.[1]) / 1024;
}

/** In the place of a daemon: with the record of the VF that is there, again and again. */
async function fill(socket: string): Promise<void> {
  using client = await KeeperClient.connect(socket, Deadline.after(TIMEOUT, "the keeper"));
  const key = (await client.list()).find((one) => one.startsWith("vf/"));
  const stored = key === undefined ? undefined : await client.get(key);
  if (stored === undefined) throw new Error("the keeper has no record of a VF");
  using own = new DisposableStack();
  for (const fd of stored.fds.values()) own.use(fd);
  const numbers = [...stored.fds.values()].map((fd) => fd.number);
  const names = Array.from({ length: FDS / VFS }, (_, index) => [...stored.fds.keys()][index] ?? `more:${index}`);
  const all = new Map(names.map((name, index) => [name, numbers[index % numbers.length]!]));
  let kept = 0;
  for (let write = 0; write < WRITES; write++) {
    kept = 0;
    for (let vf = 0; vf < VFS; vf++) {
      const put = (fds: typeof all) => client.put(`vf/copy ${vf}`, () => ({ record: stored.record, fds }));
      try {
        await put(all);
        kept += all.size;
      } catch (error) {
        if (!(error instanceof VhostdError && error.code === "keeperStore")) throw error;
        await put(new Map());
      }
    }
  }
  if (kept < FDS) console.error(`the limit of open files leaves room for ${kept} fds; ${FDS} were to be kept`);
}
