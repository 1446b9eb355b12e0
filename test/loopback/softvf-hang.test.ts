import { expect, test } from "bun:test";
import { unlink, writeFile } from "node:fs/promises";
import { Deadline } from "../../src/base/deadline.ts";
import { parsePciAddress } from "../../src/pci/address.ts";
import { VfioUserFunction } from "../../src/pci/vfio-user/function.ts";
import { BlkStatus, readRequest, SECTOR } from "../kit/blk-requests.ts";
import { GuestMemoryFile } from "../kit/guest-memory-file.ts";
import { GUEST_BASE, TestDriver } from "./softvf-driver.ts";
import { serveBy, workspace } from "./softvf-process.ts";

const EXTRA = GUEST_BASE + (1 << 30);
const read = readRequest(0, SECTOR);
const soon = (what: string) => Deadline.after(5000, what);

/** Reads of a disk hang while the file named by HANG is there: such a disk is not to be had otherwise. */
const HANGING_PREADV = `
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
ssize_t preadv(int fd, const struct iovec *parts, int count, off_t offset) {
  while (access(getenv("HANG"), F_OK) == 0) usleep(1000);
  return syscall(SYS_preadv, fd, parts, count, offset, 0);
}
`;

/** The program with two VFs whose disks hang when told to. */
async function serveHanging() {
  await using undo = new AsyncDisposableStack();
  const { path } = undo.use(await workspace("disk"));
  await writeFile(path("preadv.c"), HANGING_PREADV);
  const compiled = Bun.spawnSync(["gcc", "-shared", "-fPIC", "-o", path("preadv.so"), path("preadv.c")]);
  if (!compiled.success) throw new Error(compiled.stderr.toString());
  const command = ["env", `LD_PRELOAD=${path("preadv.so")}`, `HANG=${path("hang")}`];
  const args = ["--pf", "5a:00.0", "--class", "blk", "--vfs", "2", "--disk", path("disk")];
  const program = undo.use(await serveBy(command, ...args, "--runtime-dir", path("run")));
  const resources = undo.move();
  return {
    vf(index: number) {
      const address = parsePciAddress(`5a:00.${index + 1}`);
      return { address, server: { path: path(`run/devices/${address}/vfio-user.sock`) } };
    },
    hang: () => writeFile(path("hang"), ""),
    goOn: () => unlink(path("hang")),
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
    await Bun.sleep(20);
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
    await Bun.sleep(20);
  }
  // Its client is gone, its worker is not.
  const { address, server } = softvf.vf(0);
  await expect(VfioUserFunction.connect(address, server.path, soon("connect"))).rejects.toThrow("EBUSY");
  expect(await soon("the neighbour").race(neighbour.device.status())).toBe(0xf);
  await softvf.goOn();
  const end = soon("the worker");
  await using next = await end.poll(() => TestDriver.start(softvf.vf(0)).catch(() => undefined), 10);
  expect(await next.request(read)).toMatchObject({ status: BlkStatus.ok });

  // Nor does it keep the process from ending.
  await softvf.hang();
  next.request(read).catch(() => {});
  await Bun.sleep(20);
  expect(await Deadline.after(10_000, "the end").race(softvf.stop())).toBe(0);
}, 20_000);
