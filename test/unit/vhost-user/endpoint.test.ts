import { afterEach, beforeEach, expect, test } from "bun:test";
import { existsSync, mkdtempSync, rmSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { liveFds, type OwnedFd } from "../../../src/native/fd.ts";
import { Endpoint, type EndpointOptions } from "../../../src/vhost-user/endpoint.ts";
import { FrontendListener, VhostUserFrontend } from "../../kit/frontend/frontend.ts";
import { recordingLogger } from "./harness.ts";

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

test("server: a socket that somebody else serves is an error", () => {
  const { path, endpoint } = make({ mode: "server" });
  using _listener = new FrontendListener(path);
  expect(() => endpoint.start()).toThrow("EADDRINUSE");
  endpoint[Symbol.dispose]();
  expect(existsSync(path)).toBe(true);
});
