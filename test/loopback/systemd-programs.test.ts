import { expect, test } from "bun:test";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { FakeSystemd } from "../kit/fake-systemd.ts";
import { Child } from "../kit/guest/child.ts";

/** Processes under a service manager. */

const ROOT = join(import.meta.dir, "../..");
const soon = () => Deadline.after(10_000, "the fd store");

/** Says what it finds and what it was handed, stores more, and goes on. */
const SERVICE = `
  import { spawnSync } from "node:child_process";
  import { readdirSync, readlinkSync } from "node:fs";
  import { silentLogger } from "${ROOT}/src/base/log.ts";
  import { pendingCloses } from "${ROOT}/src/native/fd.ts";
  import { drainEventfd, eventfd, signalEventfd } from "${ROOT}/src/native/sys.ts";
  import { connectFdStore } from "${ROOT}/src/systemd/connect-fd-store.ts";
  import { Notify } from "${ROOT}/src/systemd/notify.ts";
  import { takeServiceEnvironment } from "${ROOT}/src/systemd/service-environment.ts";
  const environment = takeServiceEnvironment();
  const store = await connectFdStore(environment, silentLogger, MAX);
  for (const key of (await store?.list() ?? []).toSorted()) {
    const { record, fds } = await store.get(key);
    const counts = [...fds].map(([name, fd]) => name + " " + drainEventfd(fd.number));
    console.log("found", key, JSON.stringify(record), ...counts);
  }
  const child = spawnSync("sh", ["-c", "ls /proc/self/fd; env | grep -c '^LISTEN\\\\|^NOTIFY\\\\|^FDSTORE'"]);
  console.log("a child sees", child.stdout.toString().trim().split("\\n").join(" "));
  const keys = await store?.list() ?? [];
  if (store !== undefined) {
    const kick = eventfd();
    for (let time = 0; time < 5; time++) signalEventfd(kick.number);
    await store.put("vf/" + keys.length, () => ({ record: { place: keys.length }, fds: new Map([["kick", kick.number]]) }));
  }
  while (pendingCloses() > 0) await Bun.sleep(1);
  const links = readdirSync("/proc/self/fd").map((fd) => { try { return readlinkSync("/proc/self/fd/" + fd); } catch { return ""; } });
  console.log("memory files of records:", links.filter((link) => link.includes("vhostd-record")).length);
  new Notify(environment, silentLogger).ready("serving");
  await new Promise(() => setInterval(() => {}, 1000));
`;

/** What was handed over, and is not needed any more, is closed. */
const END = ["memory files of records: 0"];

test("a process that was killed leaves its records to the next one", async () => {
  const directory = await mkdtemp(join(tmpdir(), "fd-store-"));
  await using stack = new AsyncDisposableStack();
  stack.defer(() => rm(directory, { recursive: true }));
  using systemd = new FakeSystemd();
  let starts = 0;
  /** @param max as connectFdStore() takes it. @returns what it says */
  const run = async (max?: number) => {
    const command = ["bash", "-c", 'export LISTEN_PID=$$; exec "$@"', "service"];
    starts++;
    await using program = new Child([...command, process.execPath, "-e", SERVICE.replace("MAX", `${max}`)], {
      name: "a service",
      log: join(directory, `log-${starts}`),
      environment: systemd.environment,
      fds: systemd.stored.map(({ fd }) => fd.number),
    });
    await soon().poll(() => systemd.notified.length === starts || !program.running || undefined, 5);
    await program.kill();
    return program.log.trim().split("\n");
  };
  expect(await run()).toEqual(["a child sees 0 1 2 3 0", ...END]);
  expect(await run()).toEqual(['found vf/0 {"place":0} kick 5', "a child sees 0 1 2 3 0", ...END]);
  expect(await run()).toEqual([
    'found vf/0 {"place":0} kick 0',
    'found vf/1 {"place":1} kick 5',
    "a child sees 0 1 2 3 0",
    ...END,
  ]);
  expect(systemd.notified).toEqual(Array.from({ length: 3 }, () => "READY=1\nSTATUS=serving"));
  expect(systemd.names.length).toBe(6);
  // It does not want them: nothing stays.
  expect(await run(0)).toEqual(["a child sees 0 1 2 3 0", ...END]);
  expect(systemd.names).toEqual([]);
  expect(systemd.refused).toBe(0);
}, 40_000);

test("the keeper and the software devices say when they serve and when they stop", async () => {
  const directory = await mkdtemp(join(tmpdir(), "notify-"));
  await using stack = new AsyncDisposableStack();
  stack.defer(() => rm(directory, { recursive: true }));
  const programs = { "vhostd-ha": [], "vfe-softvf": ["--pf", "0000:01:00.0", "--class", "net", "--backend", "echo"] };
  for (const [name, options] of Object.entries(programs)) {
    using systemd = new FakeSystemd();
    const runtime = join(directory, name);
    await using program = new Child(
      [process.execPath, join(ROOT, `bin/${name}.ts`), "--runtime-dir", join(runtime), ...options],
      { name, log: join(directory, `${name}.log`), environment: systemd.environment },
    );
    await program.line(/^ready /m, 10_000);
    await soon().poll(() => systemd.notified.length === 1 || undefined, 5);
    program.signal("SIGTERM");
    expect(await soon().race(program.exited)).toBe(0);
    await soon().poll(() => systemd.notified.length === 2 || undefined, 5);
    expect(systemd.notified).toEqual(["READY=1", "STOPPING=1"]);
  }
}, 40_000);
