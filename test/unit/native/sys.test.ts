import { afterEach, beforeEach, expect, test } from "bun:test";
import { mkdtempSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { SystemError } from "../../../src/base/errors.ts";
import * as sys from "../../../src/native/sys.ts";
import { fullEventfd } from "./full-eventfd.ts";
import { openFds, warmUp } from "./open-fds.ts";

let directory: string;
let fdsBefore: number;

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "sys-"));
  warmUp();
  fdsBefore = openFds();
});

afterEach(() => {
  rmSync(directory, { recursive: true });
  expect(openFds()).toBe(fdsBefore);
});

/** The errno of the SystemError that `call` throws. */
function errnoOf(call: () => unknown): number | undefined {
  try {
    call();
  } catch (error) {
    if (error instanceof SystemError) return error.errno;
    throw error;
  }
  return undefined;
}

test("an eventfd counts signals and is empty after it was drained", () => {
  using fd = sys.eventfd();
  expect(sys.drainEventfd(fd.number)).toBe(0);
  for (let count = 0; count < 200; count++) sys.signalEventfd(fd.number);
  expect(sys.drainEventfd(fd.number)).toBe(200);
  expect(sys.drainEventfd(fd.number)).toBe(0);
});

test("a signal to a full, blocking eventfd of a peer returns", () => {
  using fd = fullEventfd();
  sys.signalEventfd(fd.number);
  sys.signalEventfd(fd.number);
});

test("a signal to what is no eventfd is refused", () => {
  using file = sys.memfd("plain", 0);
  expect(errnoOf(() => sys.signalEventfd(file.number))).toBe(22);
  expect(errnoOf(() => sys.signalEventfd(1_000_000))).toBe(9);
  expect(() => sys.signalEventfd(-1)).toThrow("file descriptor is -1");
});

test("files are told apart by kind and filesystem", () => {
  using memory = sys.memfd("memory", 12288);
  using event = sys.eventfd();
  const [left, right] = sys.socketPair();
  using _left = left;
  using _right = right;
  using root = sys.openFile("/proc/version", "read");
  expect(sys.fileInfo(memory.number)).toMatchObject({ kind: "regular", filesystem: "tmpfs", size: 12288 });
  expect(sys.fileInfo(event.number)).toMatchObject({ kind: "eventfd", filesystem: "other" });
  expect(sys.fileInfo(left.number)).toMatchObject({ kind: "socket", filesystem: "other" });
  expect(sys.fileInfo(root.number)).toMatchObject({ kind: "regular", filesystem: "other", pageSize: 4096 });
  using twin = memory.dup();
  expect(sys.fileInfo(twin.number)).toEqual(sys.fileInfo(memory.number));
  using other = sys.memfd("memory", 12288);
  expect(sys.fileInfo(other.number).ino).not.toBe(sys.fileInfo(memory.number).ino);
});

test("files are read, written and cut at offsets beyond 4 GiB", () => {
  using file = sys.memfd("big", 5 * 2 ** 30);
  const at = 4 * 2 ** 30 + 10;
  expect(sys.pwrite(file.number, Uint8Array.of(1, 2, 3), at)).toBe(3);
  const into = new Uint8Array(5);
  expect(sys.pread(file.number, into.subarray(1, 4), at)).toBe(3);
  expect([...into]).toEqual([0, 1, 2, 3, 0]);
  sys.truncate(file.number, at + 2);
  expect(sys.pread(file.number, into, at)).toBe(2);
  expect(sys.pread(file.number, new Uint8Array(0), at)).toBe(0);
  expect(() => sys.pread(file.number, into, -1)).toThrow("offset is -1");
  using sealed = sys.memfd("sealed", 8192);
  sys.sealSize(sealed.number);
  for (const size of [0, 4096, 16384]) expect(() => sys.truncate(sealed.number, size)).toThrow("EPERM");
  expect(sys.pwrite(sealed.number, new Uint8Array(16), 8184)).toBe(8);
  expect(() => sys.memfd("x", 1.5)).toThrow("size of a memory file is 1.5");
});

test("files are opened as asked", () => {
  const path = join(directory, "file");
  writeFileSync(path, "abc");
  using readOnly = sys.openFile(path, "read");
  expect(errnoOf(() => sys.pwrite(readOnly.number, Uint8Array.of(1), 0))).toBe(9);
  using both = sys.openFile(path, "read-write");
  expect(sys.pwrite(both.number, Uint8Array.of(65), 0)).toBe(1);
  expect(errnoOf(() => sys.openFile(join(directory, "none"), "read"))).toBe(2);
  expect(() => sys.openFile("a\0b", "read")).toThrow("without zero characters");
});

test("a socket is listened on, connected to and accepted, with the credentials of the peer", () => {
  const path = join(directory, "socket");
  using listener = sys.listenUnix(path, 0o640);
  expect(statSync(path).mode & 0o777).toBe(0o640);
  expect(sys.accept(listener.number)).toBeUndefined();
  using client = sys.connectUnix(path);
  using server = sys.accept(listener.number);
  expect(server).toBeDefined();
  const self = { pid: process.pid, uid: process.getuid?.() ?? -1, gid: process.getgid?.() ?? -1 };
  expect(sys.peerCredentials(client.number)).toEqual(self);
});

test("the mode of a socket does not depend on the umask", () => {
  const path = join(directory, "socket");
  const before = process.umask(0o077);
  try {
    using _listener = sys.listenUnix(path, 0o666);
    expect(statSync(path).mode & 0o777).toBe(0o666);
  } finally {
    process.umask(before);
  }
});

test("an abandoned socket is replaced; a live one, and a file that is none, are not", () => {
  const path = join(directory, "socket");
  expect(errnoOf(() => sys.connectUnix(path))).toBe(2);
  const dead = sys.listenUnix(path, 0o600);
  expect(errnoOf(() => sys.listenUnix(path, 0o600))).toBe(98);
  sys.shutDown(dead.number);
  dead[Symbol.dispose]();
  expect(errnoOf(() => sys.connectUnix(path))).toBe(111);
  using _listener = sys.listenUnix(path, 0o600);
  using _client = sys.connectUnix(path);
  const file = join(directory, "file");
  writeFileSync(file, "precious");
  expect(errnoOf(() => sys.listenUnix(file, 0o600))).toBe(98);
  expect(statSync(file).size).toBe(8);
});

test("a path that does not fit a socket address is refused, counted in bytes", () => {
  const fits = join(directory, "x".repeat(107 - directory.length - 1));
  using _listener = sys.listenUnix(fits, 0o600);
  using _client = sys.connectUnix(fits);
  expect(errnoOf(() => sys.connectUnix(`${fits}y`))).toBe(36);
  expect(errnoOf(() => sys.listenUnix(`${fits.slice(0, -1)}é`, 0o600))).toBe(36);
});

test("the limit of open files is raised to the hard one", () => {
  const limit = sys.raiseOpenFileLimit();
  expect(limit).toBeGreaterThan(0);
  expect(sys.raiseOpenFileLimit()).toBe(limit);
});
