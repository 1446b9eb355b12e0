import { afterAll, beforeAll, beforeEach, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { SystemError } from "../../src/base/errors.ts";
import { RpcClient } from "../../src/rpc/client.ts";
import { atLength } from "../kit/at-length.ts";
import type { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { holdings } from "../kit/fuzz/holdings.ts";
import { exchange, run } from "../kit/machine/disk-guest.ts";
import { FormerFrontend, type Kept } from "../kit/machine/former-frontend.ts";
import { FRONTEND_MEMORY } from "../kit/machine/frontend-process.ts";
import { HostNotifiers } from "../kit/machine/host-notifier.ts";
import { type CliResult, MACHINE_TEST_TIMEOUT, MachineLab } from "../kit/machine/lab.ts";
import { VirtioWindow } from "../kit/machine/virtio-window.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";

/**
 * A function whose doorbells were given to a front-end is closed and opened anew before the next front-end is served:
 * whoever keeps its file could drive it with the memory of the next. As long as somebody does, nobody is served, and
 * everybody is told who it is.
 */

const VM = "11111111-1111-1111-1111-111111111111";
const QUEUES = 2;
const SOME = 20;
const ROUNDS = atLength(6, 3);
/** Where the guest's other memory is, which only the other disk of the VM uses. */
const ELSEWHERE = [{ gpa: 2 ** 33, size: 16 << 20 }] as const;
/** Milliseconds in which a VF that is free has served a front-end a hundred times. */
const LONG_ENOUGH = 300;
/** Milliseconds: the kernel's closing of it, and two attempts to open it again. */
const SERVED = 60_000;

let lab: MachineLab;
/** A function whose doorbells are given away, and another one. */
let lent: string;
let other: string;
let window: VirtioWindow;
let logs = 0;

beforeAll(async () => {
  lab = await MachineLab.create();
  [lent, other] = lab.bind("blk2", "blk1");
  window = new VirtioWindow(lent);
}, MACHINE_TEST_TIMEOUT);
afterAll(async () => {
  await lab?.[Symbol.asyncDispose]();
}, MACHINE_TEST_TIMEOUT);
beforeEach(async () => {
  await lab.removeAll();
}, MACHINE_TEST_TIMEOUT);

function startFormer(kept: Kept): Promise<FormerFrontend> {
  return FormerFrontend.start(lab.socket(lent), join(lab.directory, `former${logs++}.log`), kept, QUEUES);
}

/** A connection to the VF, or undefined where it does not listen. */
function tryDial(address: string): VhostUserFrontend | undefined {
  try {
    return lab.dial(address);
  } catch (error) {
    if (error instanceof SystemError) return undefined;
    throw error;
  }
}

/** A front-end that comes back until it is served, as VMMs do. */
function comesBack(address: string): Promise<VhostUserFrontend> {
  return Deadline.after(SERVED, `connection to ${address}`).poll(() => tryDial(address), 10);
}

/** Waits until the VF waits for whoever holds its function. @returns its reason */
async function waitsFor(former: FormerFrontend): Promise<string> {
  return await Deadline.after(SERVED, `${lent}: waits for process ${former.pid}`).poll(async () => {
    const { state, reason } = await lab.info(lent);
    return state === "attaching" && reason?.includes(named(former)) ? reason : undefined;
  }, 20);
}

/** As it stands in what the daemon says. */
function named({ pid }: FormerFrontend): string {
  return `process ${pid} "${readFileSync(`/proc/${pid}/comm`, "utf8").trim()}"`;
}

/** The next front-end is served, and nobody else writes to its memory. */
async function servesNext(): Promise<void> {
  using frontend = await comesBack(lent);
  await run(frontend, QUEUES);
  {
    using _doorbells = await HostNotifiers.use(frontend);
    await exchange(frontend, SOME);
  }
  // Of its memory the rings and buffers alone were written to.
  const [low] = FRONTEND_MEMORY;
  expect(frontend.memory.read(low.gpa, low.size).every((byte) => byte === 0)).toBe(true);
}

/** What becomes of the VF, as whoever subscribes to events is told. Ends with the connection. */
async function subscribe(states: unknown[]): Promise<RpcClient> {
  const deadline = Deadline.after(SERVED, "subscription to events");
  const client = await RpcClient.connect(lab.rpcSocket, deadline);
  client.onNotification((_, event) => states.push((event as { readonly state: unknown }).state));
  await client.call("events.subscribe", {}, deadline);
  return client;
}

for (const [how, kept, end] of [
  ["keeps the fd and closes it later", "fd", (former: FormerFrontend) => former.letGo()],
  ["keeps a doorbell mapped until it is killed", "mapping", (former: FormerFrontend) => former.kill()],
] as const) {
  test(
    `a former front-end ${how}: the next one is served after that, by a function that was reset`,
    async () => {
      await lab.add(lent);
      await using former = await startFormer(kept);
      await former.endSession();
      const reason = await waitsFor(former);
      expect(reason).toContain(lent);
      expect((await lab.info(lent)).connected).toBe(false);
      // At rest, but at the mercy of whoever has the fd.
      expect({ status: window.status, busMaster: window.busMaster }).toEqual({ status: 0, busMaster: false });
      if (kept === "fd") {
        await former.masterBus();
        expect(window.busMaster).toBe(true);
      }
      for (const until = Date.now() + LONG_ENOUGH; Date.now() < until; await Bun.sleep(10)) {
        expect(tryDial(lent) === undefined).toBe(true);
      }
      expect((await lab.info(lent)).state).toBe("attaching");

      await end(former);
      expect((await lab.reaches(lent, "idle")).reason).toBeNull();
      expect({ status: window.status, busMaster: window.busMaster }).toEqual({ status: 0, busMaster: false });
      await servesNext();
    },
    MACHINE_TEST_TIMEOUT,
  );
}

/** Of what vf -r has printed. */
function warnsOf(former: FormerFrontend, { code, stdout, stderr }: CliResult): void {
  expect({ code, answer: JSON.parse(stdout) }).toEqual({ code: 0, answer: { errno: 0, errstr: "Success" } });
  expect(stderr).toMatch(/^vfe-vhost-cli: warning: /m);
  expect(stderr).toContain(named(former));
}

test(
  "vf -r while a VF waits for who holds it: a warning names the process, others of the VM go on, and vf -a waits for its end",
  async () => {
    await lab.add(lent, { vm: VM });
    await lab.add(other, { vm: VM });
    using neighbour = await comesBack(other);
    await run(neighbour, QUEUES, ELSEWHERE);
    const io = new VerifiedDisk().runOn(neighbour.queues[0]!.driver, 4);
    await io.progress(SOME);
    await using former = await startFormer("mapping");
    await former.endSession();
    await waitsFor(former);
    warnsOf(former, await lab.cli("vf", "-r", lent));
    await io.progress(SOME);

    const add = ["vf", "-a", lent, "-v", lab.socket(lent), "-u", VM, "--server", "--unmanaged"];
    const refused = await lab.cli(...add);
    expect(refused.code).toBe(1);
    expect(refused.stderr).toContain(named(former));
    await io.progress(SOME);
    await former.letGo();
    expect(await lab.cli(...add)).toMatchObject({ code: 0, stderr: "" });
    await servesNext();
    await io.progress(SOME);
    await io.stop();
    expect(lab.takeFaults()).toEqual([]);
  },
  MACHINE_TEST_TIMEOUT,
);

test(
  "vf -r under a front-end that was given doorbells: a warning where its process goes on having the fd, and none otherwise",
  async () => {
    await lab.add(lent);
    await using former = await startFormer("fd");
    warnsOf(former, await lab.cli("vf", "-r", lent));
    await former.hungUp();
    expect({ status: window.status, busMaster: window.busMaster }).toEqual({ status: 0, busMaster: false });
    await former.letGo();
    await lab.add(lent);
    await servesNext();
    expect(await lab.cli("vf", "-r", lent)).toMatchObject({ code: 0, stderr: "" });
  },
  MACHINE_TEST_TIMEOUT,
);

test(
  "front-ends that let go of everything are served one after the other, and no fd stays",
  async () => {
    await lab.add(lent);
    const states: unknown[] = [];
    using _events = await subscribe(states);
    const { pid } = lab.daemon;
    let before: unknown;
    for (let round = 0; round < ROUNDS; round++) {
      await servesNext();
      expect((await lab.reaches(lent, "idle")).reason).toBeNull();
      const held = await holdings(pid, Deadline.after(SERVED, "rest of the daemon"));
      before ??= held;
      expect(held).toEqual(before as typeof held);
    }
    const renewed = ["configuring", "running", "stopping", "idle", "idle", "attaching", "idle"];
    expect(states).toEqual(Array.from({ length: ROUNDS }, () => renewed).flat());
  },
  MACHINE_TEST_TIMEOUT,
);
