import { expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { Deadline } from "../../src/base/deadline.ts";
import { liveFds, type OwnedFd } from "../../src/native/fd.ts";
import { eventfd, memfd, openFile, socketPair, truncate } from "../../src/native/sys.ts";
import { Request } from "../../src/vhost-user/messages.ts";
import { LOG_BYTE } from "../../src/virtio/dirty-log.ts";
import { FeatureBit, featureBits } from "../../src/virtio/features.ts";
import { u64, type VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { setLogBase } from "../kit/frontend/migration-messages.ts";
import { RegistryLab } from "../kit/registry-lab.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";

/** A front-end that gives odd logs harms its own VF at most, and leaves nothing behind. */

const LOG_ALL = featureBits(FeatureBit.vhostLogAll);
const SIZE = 1 << 20;
const PAGE = 4096;

const soon = (what: string) => Deadline.after(10_000, what);
const setLogging = (frontend: VhostUserFrontend, on: boolean) =>
  frontend.answered(Request.SET_FEATURES, u64(on ? frontend.features | LOG_ALL : frontend.features));

/** Logs that were mapped, in the daemon and in vfe-softvf. */
function mapped({ softvf }: RegistryLab): number {
  return ["self", softvf.pid].reduce((sum: number, pid) => {
    const lines = readFileSync(`/proc/${pid}/maps`, "utf8").split("\n");
    return sum + lines.filter((line) => line.includes("hostile-log")).length;
  }, 0);
}

/** Once the front-end is gone. */
async function nothingLeft(lab: RegistryLab, fds: number): Promise<void> {
  await lab.idle();
  expect(mapped(lab)).toBe(0);
  await soon("files to be closed").poll(() => liveFds() === fds || undefined, 1);
}

/** A VF that serves a guest, and another one, not connected. */
async function make() {
  await using undo = new AsyncDisposableStack();
  const lab = undo.use(await RegistryLab.create());
  await lab.registry.addPf(lab.pf);
  const victim = undo.use(await lab.connect(lab.vf2, "victim.sock"));
  await lab.run(victim);
  const io = new VerifiedDisk(0, 32).runOn(victim.queues[0]!.driver, 4);
  await io.progress(20);
  await lab.serve();
  const parts = undo.move();
  return {
    lab,
    victim,
    /** It goes on, and its PF moves it. */
    async goesOn() {
      await io.progress(50);
      expect(await lab.registry.moveVf(lab.vf2, "status")).toBe("running");
    },
    async [Symbol.asyncDispose]() {
      await io.stop();
      await parts[Symbol.asyncDispose]();
    },
  };
}

/** What a front-end does with its log, after that. */
type Then = (file: OwnedFd) => void;

const made = (bytes: number) => () => memfd("hostile-log", bytes);
const LOGS: readonly (readonly [name: string, file: () => OwnedFd, offset: number, size: number, then?: Then])[] = [
  ["is read-only", () => openedForReading(), 0, SIZE],
  ["is sparse, and far larger than guest memory", made(2 ** 46), 0, 2 ** 46],
  ["is at the end of a sparse file", made(2 ** 46), 2 ** 46 - SIZE, SIZE],
  ["begins where no number can say", made(SIZE), Number.MAX_SAFE_INTEGER - PAGE + 1, SIZE],
  ["begins inside a page", made(2 * SIZE), 8, SIZE],
  ["has 8 bytes", made(8), 0, 8],
  ["is a socket", () => socket(), 0, SIZE],
  ["is an eventfd", () => eventfd(), 0, SIZE],
  ["is a device", () => openFile("/dev/zero", "read-write"), 0, SIZE],
  ["is emptied", made(SIZE), 0, SIZE, ({ number }) => truncate(number, 0)],
  ["is cut to 8 bytes", made(SIZE), 0, SIZE, ({ number }) => truncate(number, 8)],
];

function openedForReading(): OwnedFd {
  using file = memfd("hostile-log", SIZE);
  return openFile(`/proc/self/fd/${file.number}`, "read");
}

function socket(): OwnedFd {
  const [one, other] = socketPair();
  other[Symbol.dispose]();
  return one;
}

test("whatever the log is, other VFs go on", async () => {
  await using parts = await make();
  const { lab, victim } = parts;
  const before = liveFds();
  for (const [name, open, offset, size, then] of LOGS) {
    using frontend = lab.dial();
    await lab.run(frontend);
    const { driver } = frontend.queues[0]!;
    using file = open();
    const io = new VerifiedDisk(64, 32).runOn(driver, 4);
    const served = (async () => {
      await setLogBase(frontend, { fd: file.number, offset, size });
      await setLogging(frontend, true);
      then?.(file);
      await parts.goesOn();
      await setLogging(frontend, false);
    })();
    await soon(`a log that ${name}`).race(served.catch(() => {}));
    await parts.goesOn();
    frontend.channel[Symbol.dispose]();
    await lab.idle();
    void io.stop().catch(() => {});
  }
  {
    // Memory of guests is a log as good as any: its front-end can write there anyway.
    using frontend = lab.dial();
    await lab.run(frontend);
    for (const { file } of [frontend.memory.regions[0]!, victim.memory.regions[0]!]) {
      await setLogBase(frontend, { fd: file.file.number, offset: 0, size: SIZE });
      await setLogging(frontend, true);
      await parts.goesOn();
    }
  }
  await nothingLeft(lab, before);
}, 60_000);

test("of a log only that part is mapped that guest memory takes", async () => {
  await using parts = await make();
  const { lab } = parts;
  using frontend = lab.dial();
  await lab.run(frontend);
  using file = memfd("hostile-log", 2 ** 46);
  await setLogBase(frontend, { fd: file.number, offset: PAGE, size: 2 ** 45 });
  await setLogging(frontend, true);
  const lines = readFileSync(`/proc/${lab.softvf.pid}/maps`, "utf8").split("\n");
  const sizes = lines.flatMap((line) => {
    const [, from, to] = /^([0-9a-f]+)-([0-9a-f]+) .*hostile-log/.exec(line) ?? [];
    return from === undefined ? [] : [Number.parseInt(to!, 16) - Number.parseInt(from, 16)];
  });
  expect(sizes).toEqual([Math.ceil(frontend.memory.end / LOG_BYTE / PAGE) * PAGE]);

  // Guest memory that is hardly there, but far away.
  const far = frontend.memory.add(2 ** 46 - PAGE, PAGE);
  await frontend.addRegion(far);
  await soon("the device to be stopped").poll(
    () => lab.warnings.some((line) => line.includes("for which a map needs")) || undefined,
    1,
  );
  await parts.goesOn();
}, 30_000);

test("marking that begins and ends all the time, in one log after the other, leaves nothing", async () => {
  await using parts = await make();
  const { lab } = parts;
  const before = liveFds();
  using frontend = lab.dial();
  await lab.run(frontend);
  using file = memfd("hostile-log", 256 << 20);
  for (let round = 0; round < 10; round++) {
    for (let time = 0; time < 20; time++) {
      using other = memfd("hostile-log", SIZE);
      await setLogBase(frontend, { fd: other.number, offset: 0, size: SIZE });
      await setLogBase(frontend, { fd: file.number, offset: (round * 20 + time) * PAGE, size: SIZE });
      await setLogging(frontend, time % 2 === 0);
    }
    await parts.goesOn();
    expect(mapped(lab)).toBe(0);
  }
  frontend[Symbol.dispose]();
  file[Symbol.dispose]();
  await nothingLeft(lab, before);
}, 60_000);
