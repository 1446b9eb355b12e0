import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { existsSync, mkdtempSync, rmSync, statSync, writeFileSync } from "node:fs";
import { connect } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { RpcClient } from "../../src/rpc/client.ts";
import { rejection } from "../kit/rejection.ts";

const DAEMON = join(import.meta.dir, "../../bin/vhostd.ts");
const soon = () => Deadline.after(10_000, "the test");

let directory: string;
let socket: string;
const children = new Set<ReturnType<typeof spawn>>();

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "vhostd-daemon-"));
  socket = join(directory, "run/rpc.sock");
});

afterEach(async () => {
  for (const child of children) {
    child.kill("SIGKILL");
    await child.exited;
  }
  children.clear();
  rmSync(directory, { recursive: true });
});

function spawn(args: readonly string[]) {
  return Bun.spawn([process.execPath, DAEMON, ...args], { stdout: "pipe", stderr: "pipe" });
}

function start(...args: string[]) {
  const all = ["--runtime-dir", join(directory, "run"), "--bus", join(directory, "bus"), ...args];
  const child = spawn(all);
  children.add(child);
  return child;
}

async function startReady(...args: string[]) {
  const child = start(...args);
  const { value } = await soon().race(child.stdout.getReader().read());
  if (value === undefined) throw new Error(await child.stderr.text());
  expect(new TextDecoder().decode(value)).toBe(`ready ${join(directory, "run")}\n`);
  return child;
}

async function call(method: string, params = {}): Promise<unknown> {
  using client = await RpcClient.connect(socket, soon());
  return await client.call(method, params, soon());
}

/** A daemon that is to end by itself, and what it said. */
async function ended(child: ReturnType<typeof spawn>) {
  const code = await soon().race(child.exited);
  return { code, stderr: await child.stderr.text() };
}

describe("the daemon as a process", () => {
  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    test(`${signal}: exit code 0, no socket left`, async () => {
      const child = await startReady();
      expect(statSync(socket).mode & 0o777).toBe(0o660);
      expect(await call("stats")).toMatchObject({ pfs: 0, vfs: 0, sessions: 0 });
      child.kill(signal);
      expect(await ended(child)).toMatchObject({ code: 0 });
      expect(existsSync(socket)).toBe(false);
    });
  }

  test("a second one in its directory is refused with the pid of the first, which goes on", async () => {
    const first = await startReady();
    const { code, stderr } = await ended(start());
    expect(code).toBe(1);
    expect(stderr).toContain(`the daemon with pid ${first.pid} runs in ${join(directory, "run")} already`);
    expect(await call("pf.list")).toEqual({ pfs: [] });
  });

  test("of several that start at the same moment over a dead one's socket, one serves", async () => {
    const first = await startReady();
    first.kill("SIGKILL");
    await first.exited;
    const all = Array.from({ length: 4 }, () => start());
    await Deadline.after(15_000, "the end of all but one").poll(
      () => all.filter(({ exitCode }) => exitCode !== null).length === 3 || undefined,
      5,
    );
    expect(all.filter(({ exitCode }) => exitCode === 1)).toHaveLength(3);
    await Deadline.after(5_000, "an answer").poll(() => call("pf.list").catch(() => undefined), 20);
  });

  test("after kill -9 a new one takes the place", async () => {
    const first = await startReady();
    first.kill("SIGKILL");
    await first.exited;
    expect(existsSync(socket)).toBe(true);
    await startReady();
    expect(await call("pf.list")).toEqual({ pfs: [] });
  });

  test("a function that no bus has", async () => {
    await startReady();
    expect(await rejection(call("pf.add", { device: "5a:00.0" }))).toMatchObject({ code: "pfNotFound" });
    expect(await rejection(call("vf.add", { device: "5a:00.1" }))).toMatchObject({ code: "vfNotFound" });
  });

  test("devices of the configuration that cannot be added are logged, the daemon serves", async () => {
    const config = join(directory, "vhostd.toml");
    writeFileSync(config, `[[pf]]\ndevice = "5a:00.0"\n[[vf]]\ndevice = "5a:00.1"\n`);
    const child = await startReady("--config", config);
    expect(await call("pf.list")).toEqual({ pfs: [] });
    child.kill("SIGTERM");
    const { code, stderr } = await ended(child);
    expect(code).toBe(0);
    expect(stderr).toContain("PF 0000:5a:00.0 of the configuration could not be added");
    expect(stderr).toContain("VF 0000:5a:00.1 of the configuration could not be added");
  });

  test("callers are logged by their credentials", async () => {
    const child = await startReady("--log-level", "debug");
    await call("pf.list");
    child.kill("SIGTERM");
    const { stderr } = await ended(child);
    expect(stderr).toContain(`pid ${process.pid} uid ${process.getuid!()} connected`);
  });

  test("TCP where it is asked for", async () => {
    const child = await startReady("--rpc-tcp", "127.0.0.1:0");
    child.kill("SIGTERM");
    const { stderr } = await ended(child);
    expect(stderr).toMatch(/through TCP 127\.0\.0\.1:\d+/);
  });
});

describe("what it cannot start with", () => {
  const cases: [string, () => string[], number, string][] = [
    ["an unknown option", () => ["--nope"], 2, "usage: vfe-vhostd"],
    ["an argument", () => ["5a:00.0"], 2, "unexpected argument"],
    ["TCP for everyone", () => ["--rpc-tcp", "0.0.0.0:12190"], 1, "not a loopback address"],
    ["no such file", () => ["--config", join(directory, "none.toml")], 1, "none.toml cannot be read: ENOENT"],
    ["a runtime directory that is a file", () => ["--runtime-dir", DAEMON], 1, "cannot be made: EEXIST"],
    ["a path too long for a socket", () => ["--runtime-dir", join(directory, "x".repeat(100))], 1, "longer than 107"],
    ["a plugin that is not there", () => ["--config", pluginConfig()], 1, "plugin /nowhere/x.ts cannot be loaded"],
  ];
  function pluginConfig(): string {
    const config = join(directory, "vhostd.toml");
    writeFileSync(config, `plugins = ["/nowhere/x.ts"]\n`);
    return config;
  }
  for (const [what, args, code, message] of cases) {
    test(what, async () => {
      const outcome = await ended(start(...args()));
      expect(outcome).toEqual({ code, stderr: expect.stringContaining(message) });
      expect(existsSync(socket)).toBe(false);
    });
  }
});

test("hostile clients leave the daemon and its fds as they were", async () => {
  await startReady();
  const fds = async () => ((await call("stats")) as { fds: number }).fds;
  const before = await fds();
  const texts = [
    "{".repeat(1000),
    "GET / HTTP/1.1\r\n\r\n",
    "{nonsense}",
    `{"a":"${"x".repeat(1 << 20)}`,
    "[]".repeat(500),
  ];
  const ends = Array.from({ length: 200 }, (_, i) => {
    const client = connect({ path: socket });
    const gone = new Promise<void>((resolve) => client.on("close", () => resolve()));
    client.on("error", () => {});
    client.on("connect", () => client.end(texts[i % texts.length]!));
    client.resume();
    return gone;
  });
  expect(await call("pf.list")).toEqual({ pfs: [] });
  await soon().race(Promise.all(ends));
  await soon().poll(async () => ((await fds()) === before ? true : undefined), 20);
});
