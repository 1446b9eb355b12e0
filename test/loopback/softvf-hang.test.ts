import { expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { unlink, writeFile } from "node:fs/promises";
import { Deadline } from "../../src/base/deadline.ts";
import { parsePciAddress } from "../../src/pci/address.ts";
import { VfioUserFunction } from "../../src/pci/vfio-user/function.ts";
import { BlkStatus, blkResult, readRequest, SECTOR } from "../kit/blk-requests.ts";
import { GuestMemoryFile } from "../kit/guest-memory-file.ts";
import { rejection } from "../kit/rejection.ts";
import { RawAdmin } from "./softvf-admin.ts";
import { GUEST_BASE, TestDriver } from "./softvf-driver.ts";
import { serveBy, workspace } from "./softvf-process.ts";

/** The administrator's command may succeed later. */
const RETRY = 0x01;
const EXTRA = GUEST_BASE + (1 << 30);
const read = readRequest(0, SECTOR);
const soon = (what: string) => Deadline.after(5000, what);

/**
 * Reads by a ring worker hang while the file named by HANG is there: such a disk is not to be had otherwise. The file
 * named by HELD says that one does.
 */
const HANGING_READ = `
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
static void hang(void) {
  char name[16] = "";
  pthread_getname_np(pthread_self(), name, sizeof name);
  if (strcmp(name, "ring-worker") != 0) return;
  if (access(getenv("HANG"), F_OK) == 0) close(open(getenv("HELD"), O_CREAT | O_WRONLY, 0600));
  while (access(getenv("HANG"), F_OK) == 0) usleep(1000);
}
ssize_t preadv(int fd, const struct iovec *parts, int count, off_t offset) {
  hang();
  return syscall(SYS_preadv, fd, parts, count, offset, 0);
}
ssize_t pread(int fd, void *to, size_t size, off_t offset) {
  hang();
  return syscall(SYS_pread64, fd, to, size, offset);
}
ssize_t pread64(int fd, void *to, size_t size, off_t offset) {
  return pread(fd, to, size, offset);
}
`;

/** The program with two VFs whose disks hang when told to. */
async function serveHanging() {
  await using undo = new AsyncDisposableStack();
  const { path } = undo.use(await workspace("disk"));
  await writeFile(path("read.c"), HANGING_READ);
  const compiled = Bun.spawnSync(["gcc", "-shared", "-fPIC", "-o", path("read.so"), path("read.c")]);
  if (!compiled.success) throw new Error(compiled.stderr.toString());
  const command = ["env", `LD_PRELOAD=${path("read.so")}`, `HANG=${path("hang")}`, `HELD=${path("held")}`];
  const args = ["--pf", "5a:00.0", "--class", "blk", "--vfs", "2", "--disk", path("disk")];
  const program = undo.use(await serveBy(command, ...args, "--runtime-dir", path("run")));
  const resources = undo.move();
  const reach = (fn: number) => {
    const address = parsePciAddress(`5a:00.${fn}`);
    return { address, server: { path: path(`run/devices/${address}/vfio-user.sock`) } };
  };
  return {
    pf: reach(0),
    vf: (index: number) => reach(index + 1),
    hang: () => writeFile(path("hang"), ""),
    /** A read hangs. */
    held: () => soon("a read that hangs").poll(() => existsSync(path("held")) || undefined, 1),
    goOn: () => Promise.all([unlink(path("hang")), unlink(path("held"))]),
    stop: () => program.stop(),
    [Symbol.asyncDispose]: () => resources.disposeAsync(),
  };
}

test("a disk that hangs holds up its own VF, not the process", async () => {
  await using softvf = await serveHanging();
  await using neighbour = await TestDriver.start(softvf.vf(1));
  using extra = new GuestMemoryFile(EXTRA, 1 << 20);
  {
    await using driver = await TestDriver.start(softvf.vf(0));
    await softvf.hang();
    const request = driver.request(read);
    await softvf.held();
    const changes: string[] = [];
    const mapped = driver.map(extra).then(() => changes.push("mapped"));
    const unmapped = driver.unmap(EXTRA, extra.size).then(() => changes.push("unmapped"));
    expect(await soon("the neighbour").race(neighbour.device.status())).toBe(0xf);
    expect(changes).toEqual([]);
    await softvf.goOn();
    await Promise.all([mapped, unmapped]);
    expect(changes).toEqual(["mapped", "unmapped"]);
    expect(await request).toMatchObject({ status: BlkStatus.ok });

    await softvf.hang();
    driver.request(read).catch(() => {});
    await softvf.held();
  }
  // Its client is gone, its worker is not.
  const { address, server } = softvf.vf(0);
  expect((await rejection(VfioUserFunction.connect(address, server.path, soon("connect")))).message).toContain("EBUSY");
  expect(await soon("the neighbour").race(neighbour.device.status())).toBe(0xf);
  await softvf.goOn();
  const end = soon("the worker");
  await using next = await end.poll(() => TestDriver.start(softvf.vf(0)).catch(() => undefined), 10);
  expect(await next.request(read)).toMatchObject({ status: BlkStatus.ok });

  // Nor does it keep the process from ending.
  await softvf.hang();
  next.request(read).catch(() => {});
  await softvf.held();
  expect(await Deadline.after(10_000, "the end").race(softvf.stop())).toBe(0);
}, 20_000);

test("a command on a VF whose disk hangs waits, those on others do not", async () => {
  await using softvf = await serveHanging();
  await using admin = await RawAdmin.open(softvf.pf);
  await using driver = await TestDriver.start(softvf.vf(0));
  await softvf.hang();
  const request = driver.queues[0]!.request(read.readable, read.writable);
  await softvf.held();
  let quiesced = false;
  const step = admin.step(0, "quiesced").finally(() => {
    quiesced = true;
  });
  for (let count = 0; count < 10; count++) await admin.steps(1, "quiesced", "freezed", "quiesced", "running");
  expect(quiesced).toBe(false);
  // Its administrator is told before it gives up, and finds the VF as it was.
  expect([await step, await admin.status(0)]).toEqual([RETRY, "running"]);
  const again = admin.step(0, "quiesced");
  await softvf.goOn();
  expect(await again).toBe(0);
  expect(blkResult(await soon("the request").race(request))).toMatchObject({ status: BlkStatus.ok });
}, 20_000);
