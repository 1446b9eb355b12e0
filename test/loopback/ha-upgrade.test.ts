import { expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { cp, mkdir, mkdtemp, rm, symlink } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { $ } from "bun";
import { KEEPER_VERSION } from "../../src/keeper/messages.ts";
import { HaLab } from "../kit/ha-lab.ts";
import { SteppedGuest } from "../kit/ha-steps.ts";

const ROOT = join(import.meta.dir, "../..");
/** What the commit before must have for a daemon of this one to go on with. */
const ADOPTION = "src/daemon/ha/adoption.ts";

/** Why the commit before cannot be run, or undefined. */
async function obstacle(): Promise<string | undefined> {
  const git = await $`git -C ${ROOT} cat-file -e HEAD~1:${ADOPTION}`.quiet().nothrow();
  if (git.exitCode !== 0) return "there is no commit before this one whose daemon keeps anything";
  const messages = await $`git -C ${ROOT} show HEAD~1:src/keeper/messages.ts`.text();
  const speaks = new RegExp(`^export const KEEPER_VERSION = ${KEEPER_VERSION};$`, "m").test(messages);
  return speaks ? undefined : "the commit before speaks another protocol with the keeper";
}

/** The sources of the commit before, ready to run. */
async function checkOut(directory: string): Promise<void> {
  await mkdir(directory);
  await $`git -C ${ROOT} archive HEAD~1 | tar -x -C ${directory}`.quiet();
  await symlink(join(ROOT, "node_modules"), join(directory, "node_modules"));
  const isSame = (await $`git -C ${ROOT} diff --quiet HEAD~1 -- native`.quiet().nothrow()).exitCode === 0;
  if (isSame && existsSync(join(ROOT, "native/build"))) {
    await cp(join(ROOT, "native/build"), join(directory, "native/build"), { recursive: true });
  } else await $`make -C ${join(directory, "native")} -j2`.quiet();
}

const why = await obstacle();

test.skipIf(why !== undefined)(
  `a daemon of the commit before is followed by one of this, unnoticed${why === undefined ? "" : ` [skip: ${why}]`}`,
  async () => {
    await using undo = new AsyncDisposableStack();
    const directory = await mkdtemp(join(tmpdir(), "before-"));
    undo.defer(() => rm(directory, { recursive: true }));
    const before = join(directory, "tree");
    await checkOut(before);
    await using lab = await HaLab.create({ queues: 2 });
    await lab.startDaemon({ program: [process.execPath, join(before, "bin/vhostd.ts")] });
    await lab.addPf();
    using guest = await SteppedGuest.start(lab);
    await lab.replaceDaemon();
    await lab.takenUp();
    await guest.progress();
    await guest.stop("new");
    await guest.start();
    await guest.end();
    expect(guest.reconnects).toBe(0);
    expect(await lab.call("stats")).toMatchObject({ vfs: 1, sessions: 1, protected: true });
  },
  300_000,
);
