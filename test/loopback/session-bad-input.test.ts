import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { BAD_INPUT, type BadInput, prepareFor } from "../kit/frontend/bad-input.ts";
import { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { MOVERS } from "../kit/movers.ts";
import { Machine, startDisk, writeAndVerify } from "./session-machine.ts";

/** Each bad input of the kit against the daemon as a process, on several VFs at once, while another VF does I/O. */

const BAD_VFS = [1, 2, 3, 4, 5, 6];
const GOOD_VF = 0;

describe.each(MOVERS)("moved by $mover", ({ migration }) => {
  let machine: Machine;

  beforeAll(async () => {
    machine = await Machine.start({ vfs: 1 + BAD_VFS.length, queues: 4, migration });
    for (const vf of [GOOD_VF, ...BAD_VFS]) {
      await machine.addVf(vf, "server");
      await serve(vf);
    }
  }, 30_000);
  afterAll(async () => {
    await machine?.[Symbol.asyncDispose]();
  });

  test("each ends its session with a line in the log; another VF's I/O goes on; no fd is left", async () => {
    using good = await connected(GOOD_VF);
    await startDisk(good, 2);
    const before = await machine.steadyFds(BAD_VFS);
    let under_way = true;
    let written = 0;
    const traffic = (async () => {
      for (; under_way; written++) await writeAndVerify(good.queues[written % 2]!, 8 * (written % 512));
    })();
    const left = BAD_INPUT.entries();
    const failures: string[] = [];
    await Promise.all(
      BAD_VFS.map(async (vf) => {
        for (const [, input] of left) {
          const missing = await provoke(vf, input);
          if (missing.length > 0) failures.push(`${input.what}: the log lacks ${missing.join(", ")}`);
          // A session that runs ends the pause that the daemon makes after a bad one.
          await serve(vf);
        }
      }),
    );
    under_way = false;
    await traffic;
    expect(failures).toEqual([]);
    expect(written).toBeGreaterThan(BAD_INPUT.length);
    expect(await machine.steadyFds(BAD_VFS)).toBe(before);
  }, 120_000);

  /** @returns what the log does not say about it */
  async function provoke(vf: number, input: BadInput): Promise<readonly string[]> {
    using frontend = await connected(vf);
    await prepareFor(input, frontend);
    const start = machine.daemon.log.length;
    await input.send(frontend).catch(() => {});
    await frontend.hungUp();
    await machine.idle(vf);
    const lines = machine.daemon.log.slice(start).split("\n");
    const own = lines.filter((line) => line.includes(machine.address(vf)) && line.includes("session ended"));
    return own.length === 1 ? input.reason.filter((part) => !own[0]!.includes(part)) : [`one line (${own.length})`];
  }

  async function serve(vf: number): Promise<void> {
    using frontend = await connected(vf);
    await startDisk(frontend, 1);
    await writeAndVerify(frontend.queues[0]!, 0);
  }

  async function connected(vf: number): Promise<VhostUserFrontend> {
    await machine.idle(vf);
    return VhostUserFrontend.connect(machine.socket(vf));
  }
});
