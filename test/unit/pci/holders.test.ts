import { afterAll, beforeAll, expect, test } from "bun:test";
import { mkdir, mkdtemp, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describeHolders, findHolders } from "../../../src/pci/vfio/holders.ts";

let proc = "";
const VF = "0000:5a:00.1";
const GROUP = "/dev/vfio/12";

interface FakeProcess {
  readonly fds?: Readonly<Record<string, string>>;
  readonly fdinfo?: Readonly<Record<string, string>>;
  readonly maps?: string;
}

async function addProcess(pid: string, name: string, { fds = {}, fdinfo = {}, maps = "" }: FakeProcess): Promise<void> {
  for (const directory of ["fd", "fdinfo"]) await mkdir(join(proc, pid, directory), { recursive: true });
  await writeFile(join(proc, pid, "comm"), `${name}\n`);
  await writeFile(join(proc, pid, "maps"), maps);
  for (const [fd, target] of Object.entries(fds)) await symlink(target, join(proc, pid, "fd", fd));
  for (const [fd, text] of Object.entries(fdinfo)) await writeFile(join(proc, pid, "fdinfo", fd), text);
}

const REGISTERS = "7f00-7f01 rw-s 0000 00:0f 7  anon_inode:[vfio-device]\n";

beforeAll(async () => {
  proc = await mkdtemp(join(tmpdir(), "proc-"));
  await addProcess("10", "qemu-system", { fds: { 0: "/dev/null", 7: GROUP } });
  await addProcess("11", "idle", {
    fds: { 0: "/dev/vfio/120", 1: "socket:[9]" },
    maps: "7f00-7f01 r--s 0 00:00 1 /lib/x\n",
  });
  await addProcess("12", "keeper", { fds: { 3: "anon_inode:[vfio-device]" } });
  await addProcess("13", "new-kernel", {
    fds: { 3: "anon_inode:[vfio-device]" },
    fdinfo: { 3: `pos:\t0\nvfio-device-syspath: /sys/devices/pci0000:00/0000:00:01.0/${VF}\n` },
  });
  await addProcess("14", "elsewhere", {
    fds: { 3: "anon_inode:[vfio-device]" },
    fdinfo: { 3: "vfio-device-syspath: /sys/devices/pci0000:00/0000:00:02.0\n" },
  });
  await addProcess("15", "guest", { maps: REGISTERS });
  await addProcess("16", "cdev-guest", { maps: "7f00-7f01 rw-s 0000 00:0f 7  /dev/vfio/devices/vfio3\n" });
  await mkdir(join(proc, "sys"));
});
afterAll(() => rm(proc, { recursive: true }));

test("who has a file open or mapped is found; of functions' files as far as the kernel tells", async () => {
  const holders = await findHolders([GROUP, "/dev/vfio/devices/vfio3"], VF, proc);
  const found = holders.sort((a, b) => a.pid - b.pid).map(({ pid, name, certain }) => [pid, name, certain]);
  expect(found).toEqual([
    [10, "qemu-system", true],
    [12, "keeper", false],
    [13, "new-kernel", true],
    [15, "guest", false],
    [16, "cdev-guest", true],
  ]);
  expect(await findHolders([GROUP], VF, join(proc, "missing"))).toEqual([]);
});

test("those who are certain are named; the others only where there is none", () => {
  const certain = { pid: 10, name: "qemu", what: "/dev/vfio/12 is open", certain: true };
  const perhaps = { pid: 12, name: "keeper", what: "a function of VFIO is open", certain: false };
  expect(describeHolders([perhaps, certain], 1)).toBe('held by process 10 "qemu" (/dev/vfio/12 is open)');
  expect(describeHolders([perhaps], 1)).toMatch(/^perhaps held by process 12 "keeper"/);
  expect(describeHolders([certain], 10)).toMatch(/^held by this daemon, process 10 /);
  // Its own functions say nothing about this one.
  expect(describeHolders([perhaps], 12)).toBeUndefined();
  expect(describeHolders([], 1)).toBeUndefined();
});
