import { dlopen } from "bun:ffi";
import { afterEach, beforeEach, expect, test } from "bun:test";
import { existsSync, mkdtempSync, rmSync, statSync, symlinkSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { liveFds, OwnedFd } from "../../../src/native/fd.ts";
import { eventfd } from "../../../src/native/sys.ts";
import { Endpoint, type EndpointOptions } from "../../../src/vhost-user/endpoint.ts";
import { FrontendListener, VhostUserFrontend } from "../../kit/frontend/frontend.ts";
import { LingeringSocket } from "../native/lingering-socket.ts";
import { recordingLogger } from "./harness.ts";

const libc = dlopen("libc.so.6", {
  getrlimit: { args: ["i32", "ptr"], returns: "i32" },
  setrlimit: { args: ["i32", "ptr"], returns: "i32" },
}).symbols;
const RLIMIT_NOFILE = 7;
/** The soft limit and the hard one. */
const limits = new BigUint64Array(2);

function openFileLimit(): bigint {
  libc.getrlimit(RLIMIT_NOFILE, limits);
  return limits[0]!;
}

function setOpenFileLimit(soft: bigint): void {
  libc.setrlimit(RLIMIT_NOFILE, BigUint64Array.of(soft, limits[1]!));
}

let directory: string;
let before: number;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "endpoint-"));
  before = liveFds();
});
afterEach(() => {
  rmSync(directory, { recursive: true });
  expect(liveFds()).toBe(before);
});

/** An endpoint whose connections a test takes one by one. */
function make(options: Omit<EndpointOptions, "path">, lines: string[] = []) {
  const path = join(directory, "vhost.sock");
  const arrived: OwnedFd[] = [];
  let wake = () => {};
  const endpoint = new Endpoint(
    { path, retryInterval: 2, ...options },
    (fd) => {
      arrived.push(fd);
      wake();
    },
    recordingLogger(lines),
  );
  const next = async () => {
    while (arrived.length === 0) await new Promise<void>((resolve) => (wake = resolve));
    return arrived.shift()!;
  };
  return { path, endpoint, next, arrived };
}

test("client: retries quietly until the front-end listens, and again after it is gone", async () => {
  const lines: string[] = [];
  const { path, endpoint, next } = make({ mode: "client" }, lines);
  using _endpoint = endpoint;
  endpoint.start();
  await Bun.sleep(20);
  expect(lines).toHaveLength(1);
  expect(lines[0]).toContain("no such file");
  for (let round = 0; round < 3; round++) {
    using listener = new FrontendListener(path);
    using fd = await next();
    using frontend = await listener.accept();
    expect(fd.closed).toBe(false);
    expect(frontend.channel.fd).toBeGreaterThanOrEqual(0);
    endpoint.markFree();
  }
});

test("server: one connection at a time, the next when it is free", async () => {
  const lines: string[] = [];
  const { path, endpoint, next, arrived } = make({ mode: "server", socketMode: 0o600, patience: 5 }, lines);
  endpoint.start();
  expect(statSync(path).mode & 0o777).toBe(0o600);
  using first = VhostUserFrontend.connect(path);
  using served = await next();
  using second = VhostUserFrontend.connect(path);
  await second.hungUp();
  expect(lines.at(-1)).toContain("second connection");
  endpoint.markFree();
  using third = VhostUserFrontend.connect(path);
  using servedNext = await next();
  expect(arrived).toEqual([]);
  expect([first, third].every(({ channel }) => channel.fd >= 0)).toBe(true);
  expect(served.number).not.toBe(servedNext.number);
  endpoint[Symbol.dispose]();
  expect(existsSync(path)).toBe(false);
});

test("server: a connection that comes before the last one is undone waits for that", async () => {
  const { path, endpoint, next } = make({ mode: "server", patience: 60_000 });
  using _endpoint = endpoint;
  endpoint.start();
  using first = VhostUserFrontend.connect(path);
  using served = await next();
  using second = VhostUserFrontend.connect(path);
  first[Symbol.dispose]();
  await Bun.sleep(10);
  endpoint.markFree();
  using servedNext = await next();
  expect(servedNext.number).not.toBe(served.number);
  expect(second.channel.fd).toBeGreaterThanOrEqual(0);
});

test.each(["client", "server"] as const)(
  "%s: a process that is not welcome is hung up on, and comes in once it is",
  async (mode) => {
    let welcome = false;
    const asked: number[] = [];
    const welcomes = (pid: number) => {
      asked.push(pid);
      return welcome;
    };
    const { path, endpoint, next, arrived } = make({ mode, welcomes, turnAwayInterval: 2 });
    using _endpoint = endpoint;
    using listener = mode === "client" ? new FrontendListener(path) : undefined;
    endpoint.start();
    const dial = async () => (await listener?.accept()) ?? VhostUserFrontend.connect(path);
    for (let round = 0; round < 3; round++) {
      using turnedAway = await dial();
      await turnedAway.hungUp();
    }
    expect(arrived).toEqual([]);
    expect(new Set(asked)).toEqual(new Set([process.pid]));
    welcome = true;
    using _served = mode === "server" ? VhostUserFrontend.connect(path) : undefined;
    using fd = await next();
    expect(fd.closed).toBe(false);
  },
);

test("client: a path that leads to this daemon itself is no front-end's, and the next one that listens there is", async () => {
  const lines: string[] = [];
  let pid = process.pid;
  const { path, endpoint, next, arrived } = make({ mode: "client", isOurs: (other) => other === pid }, lines);
  using _endpoint = endpoint;
  using listener = new FrontendListener(`${path}.other`);
  symlinkSync(listener.path, path);
  endpoint.start();
  for (let round = 0; round < 3; round++) {
    using refused = await listener.accept();
    await refused.hungUp();
  }
  expect(arrived).toEqual([]);
  expect(lines).toHaveLength(1);
  expect(lines[0]).toContain(`at ${path} listens no VMM but process ${process.pid}`);
  pid = 0;
  using fd = await next();
  expect(fd.closed).toBe(false);
});

test("server: another endpoint of this daemon, whose path was made to lead here, is hung up on", async () => {
  const { path, endpoint, arrived } = make({ mode: "server", isOurs: (pid) => pid === process.pid });
  using _endpoint = endpoint;
  endpoint.start();
  using refused = VhostUserFrontend.connect(path);
  await refused.hungUp();
  expect(arrived).toEqual([]);
});

test("server: those that were turned away do not hold up the one that waits behind them", async () => {
  const hour = 3_600_000;
  let asked = 0;
  const { path, endpoint, next } = make({ mode: "server", welcomes: () => ++asked > 7, turnAwayInterval: hour });
  using _endpoint = endpoint;
  endpoint.start();
  for (let dead = 0; dead < 7; dead++) VhostUserFrontend.connect(path)[Symbol.dispose]();
  using _alive = VhostUserFrontend.connect(path);
  using served = await next();
  expect(asked).toBe(8);
  expect(served.closed).toBe(false);
});

test("server: one that comes again and again is not looked at all the time", async () => {
  let asked = 0;
  const { path, endpoint } = make({ mode: "server", welcomes: () => ++asked < 0, turnAwayInterval: 3_600_000 });
  using _endpoint = endpoint;
  endpoint.start();
  using stack = new DisposableStack();
  const tries = Array.from({ length: 40 }, () => stack.use(VhostUserFrontend.connect(path)));
  await tries[15]!.hungUp();
  await Bun.sleep(5);
  expect(asked).toBe(16);
});

test("server: a socket that somebody else serves is an error", () => {
  const { path, endpoint } = make({ mode: "server" });
  using _listener = new FrontendListener(path);
  expect(() => endpoint.start()).toThrow("EADDRINUSE");
  endpoint[Symbol.dispose]();
  expect(existsSync(path)).toBe(true);
});

test.each([false, true])("server: what is no socket cannot be listened at, and is closed (taken: %p)", (taken) => {
  const { path, endpoint } = make({ mode: "server" });
  using _endpoint = endpoint;
  const fd = eventfd();
  expect(() => endpoint.start(taken, fd)).toThrow("ENOTSOCK");
  expect(fd.closed).toBe(true);
  expect(existsSync(path)).toBe(false);
});

test("server: a connection that cannot be accepted now is accepted later, with one word about it", async () => {
  const lines: string[] = [];
  const { path, endpoint, next } = make({ mode: "server" }, lines);
  using _endpoint = endpoint;
  endpoint.start();
  using _first = VhostUserFrontend.connect(path);
  const limit = openFileLimit();
  setOpenFileLimit(3n);
  await Bun.sleep(30);
  setOpenFileLimit(limit);
  using _served = await next();
  expect(lines).toHaveLength(1);
  expect(lines[0]).toContain("EMFILE");
});

test.each(["client", "server"] as const)(
  "%s: nobody new is served before the fds of earlier ones can be closed",
  async (mode) => {
    const lines: string[] = [];
    const { path, endpoint, next, arrived } = make({ mode }, lines);
    using _endpoint = endpoint;
    using hostile = new LingeringSocket();
    using listener = mode === "client" ? new FrontendListener(path) : undefined;
    endpoint.start();
    using _first = mode === "server" ? VhostUserFrontend.connect(path) : undefined;
    const served = await next();
    const copies = Array.from({ length: 1030 }, () => served.dup());
    new OwnedFd(hostile.fd.release(), served.lane)[Symbol.dispose]();
    for (const fd of [...copies, served]) fd[Symbol.dispose]();
    endpoint.markFree();
    using _second = mode === "server" ? VhostUserFrontend.connect(path) : undefined;
    await Bun.sleep(30);
    expect(arrived).toEqual([]);
    expect(lines.filter((line) => line.includes("cannot be closed"))).toHaveLength(1);
    hostile.release();
    using _servedNext = await next();
    expect(listener?.path ?? path).toBe(path);
  },
);
