import { afterEach, expect, setDefaultTimeout, test } from "bun:test";
import { closeSync, openSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { Machine } from "../kit/machine/inside.ts";
import { type MachineFunction, PciAddress } from "../kit/machine/pci-function.ts";
import { programLine } from "../kit/machine/programs.ts";

/** Milliseconds; a command of ours takes half a second here. */
setDefaultTimeout(120_000);
const machine = Machine.here();
const { sriov } = machine.description;
const VFS = sriov ? "" : " [skip: this QEMU emulates no SR-IOV]";
const ENABLE_SRIOV = "/sys/module/vfio_pci/parameters/enable_sriov";

interface Result {
  readonly code: number;
  readonly out: string;
  readonly err: string;
}

function cli(...args: string[]): Result {
  const { exitCode, stdout, stderr } = Bun.spawnSync([...programLine("vfe-vhost-cli"), ...args], { timeout: 120_000 });
  return { code: exitCode, out: stdout.toString(), err: stderr.toString() };
}

/** One of the machine's own programs, which has to succeed. */
function run(...words: string[]): void {
  const { exitCode, stderr } = Bun.spawnSync(words);
  if (exitCode !== 0) throw new Error(`${words.join(" ")}: ${stderr}`);
}

/** Name of the block device or network interface of a function. */
function classDevice(one: MachineFunction, kind: "block" | "net"): string {
  const path = join("/sys/bus/pci/devices", one.address);
  const virtio = readdirSync(path).find((name) => /^virtio\d+$/.test(name));
  return readdirSync(join(path, virtio ?? "", kind))[0]!;
}

afterEach(() => {
  for (const id of [...(sriov ? ["pf0"] : []), "blk0", "net0", "bridged0", "bridged1"]) {
    const one = machine.function(id);
    if (one.driver === "vfio-pci") cli("unbind", one.address);
  }
});

for (const id of ["blk0", "net0"]) {
  test(`${id} is bound and given back; again is no error; a dry run changes nothing`, () => {
    const one = machine.function(id);
    const { address } = one;
    const lines = [
      `echo vfio-pci > /sys/bus/pci/devices/${address}/driver_override`,
      `echo ${address} > /sys/bus/pci/devices/${address}/driver/unbind`,
      `echo ${address} > /sys/bus/pci/drivers_probe`,
    ];
    expect(cli("bind", address, "--dry-run")).toEqual({ code: 0, out: `${lines.join("\n")}\n`, err: "" });
    expect(one.driver).toBe("virtio-pci");
    expect(cli("bind", address)).toEqual({ code: 0, out: `${address}: vfio-pci (before: virtio-pci)\n`, err: "" });
    expect(one.driver).toBe("vfio-pci");
    expect(cli("bind", address)).toEqual({ code: 0, out: `${address}: vfio-pci already\n`, err: "" });
    expect(cli("unbind", address)).toEqual({ code: 0, out: `${address}: virtio-pci (before: vfio-pci)\n`, err: "" });
    expect(one.driver).toBe("virtio-pci");
    expect(one.attribute("driver_override")).toBe("(null)");
  });
}

test("a disk in use is refused, with all that were to be bound with it, and taken by force", () => {
  const [blk, net] = [machine.function("blk0"), machine.function("net0")];
  const disk = `/dev/${classDevice(blk, "block")}`;
  const mounts = readFileSync("/proc/filesystems", "utf8").includes("\text4\n");
  if (mounts) {
    run("mkfs.ext4", "-q", disk);
    run("mount", disk, "/mnt");
  } else {
    run("mkswap", disk);
    run("swapon", disk);
  }
  try {
    const { code, err } = cli("bind", net.address, blk.address);
    expect(code).toBe(1);
    expect(err).toContain(mounts ? "is mounted at /mnt" : "is swap");
    expect(net.driver).toBe("virtio-pci");
  } finally {
    run(...(mounts ? ["umount", "/mnt"] : ["swapoff", disk]));
  }
  // A process has it open, and no table tells of that.
  const fd = openSync(disk, "r");
  try {
    expect(cli("bind", blk.address).err).toContain(`${disk.slice("/dev/".length)} is open in `);
    expect(cli("bind", blk.address, "--force").code).toBe(0);
  } finally {
    closeSync(fd);
  }
});

test("a network card with the default route is refused", () => {
  const net = machine.function("net0");
  const name = classDevice(net, "net");
  run("/run/busybox", "ip", "link", "set", name, "up");
  run("/run/busybox", "ip", "address", "add", "10.9.0.2/24", "dev", name);
  run("/run/busybox", "ip", "route", "add", "default", "via", "10.9.0.1");
  expect(cli("bind", net.address)).toMatchObject({
    code: 1,
    err: expect.stringContaining(`${name} carries the default route (IPv4)`),
  });
  expect(net.driver).toBe("virtio-pci");
  run("/run/busybox", "ip", "route", "del", "default");
  expect(cli("bind", net.address).code).toBe(0);
});

test("the other functions of an IOMMU group are named until they are out of the way", () => {
  const [first, second] = machine.functions("bridged");
  const bridge = first!.groupMembers
    .map((address) => new PciAddress(address))
    .find(({ driver }) => driver === "shpchp");
  expect(cli("bind", first!.address)).toMatchObject({
    code: 0,
    err: expect.stringContaining(`${second!.address} (virtio-pci)`),
  });
  expect(cli("doctor", first!.address).out).toContain(`BAD   ${first!.address}: IOMMU group ${first!.group} cannot`);
  bridge?.release();
  try {
    expect(cli("bind", second!.address).err).toBe("");
  } finally {
    bridge?.bind("shpchp");
  }
});

test("a function that is open stays where it is", () => {
  const blk = machine.function("blk0");
  cli("bind", blk.address);
  const fd = openSync(`/dev/vfio/${blk.group}`, "r+");
  try {
    const { code, err } = cli("unbind", blk.address);
    expect(code).toBe(1);
    expect(err).toContain(`process ${process.pid} `);
    expect(blk.driver).toBe("vfio-pci");
  } finally {
    closeSync(fd);
  }
});

test.skipIf(!sriov)(`a PF gets two VFs, other two, and none${VFS}`, () => {
  const pf = machine.function("pf0");
  writeFileSync(ENABLE_SRIOV, "N");
  expect(cli("sriov", pf.address, "2").err).toContain(`vfe-vhost-cli bind ${pf.address}`);
  cli("bind", pf.address);
  expect(cli("sriov", pf.address, "2", "--dry-run").out).toBe(
    `echo Y > ${ENABLE_SRIOV}\necho 2 > /sys/bus/pci/devices/${pf.address}/sriov_numvfs\n`,
  );
  expect(pf.vfs).toEqual([]);
  const made = cli("sriov", pf.address, "2");
  expect(made).toMatchObject({ code: 0, err: "" });
  expect(pf.vfs).toHaveLength(2);
  expect(made.out).toBe(pf.vfs.map(({ address }) => `${address}\n`).join(""));
  for (const vf of pf.vfs) expect(vf.driver).toBe("vfio-pci");
  expect(cli("sriov", pf.address, "2").out).toBe(made.out);

  const fd = openSync(`/dev/vfio/${pf.vfs[0]!.group}`, "r+");
  try {
    expect(cli("sriov", pf.address, "1")).toMatchObject({
      code: 1,
      err: expect.stringContaining(`process ${process.pid} `),
    });
    expect(pf.vfs).toHaveLength(2);
  } finally {
    closeSync(fd);
  }
  expect(cli("sriov", pf.address, "1").code).toBe(0);
  expect(pf.vfs).toHaveLength(1);
  expect(cli("sriov", pf.address, "9").err).toContain("can have 4 VFs, not 9");
  expect(cli("sriov", pf.address, "0")).toEqual({ code: 0, out: "", err: "" });
  expect(pf.vfs).toEqual([]);
});

interface Found {
  readonly bad: number;
  readonly findings: readonly { readonly check: string; readonly level: string; readonly seen: string }[];
}

test("the doctor finds this machine healthy, but for the daemon that does not run, and what is broken then", () => {
  const blk = machine.function("blk0");
  const look = (...args: string[]): Found => {
    const { code, out } = cli("doctor", "--json", ...args);
    const found = JSON.parse(out) as Found;
    expect(code).toBe(found.bad > 0 ? 1 : 0);
    return found;
  };
  const badOf = ({ findings }: Found) => findings.filter(({ level }) => level === "bad").map(({ check }) => check);
  cli("bind", blk.address);
  writeFileSync("/proc/sys/vm/nr_hugepages", "4");
  const healthy = look(blk.address);
  expect(badOf(healthy)).toEqual(["daemon"]);
  const seen = new Map(healthy.findings.map(({ check, level, seen: text }) => [check, `${level}: ${text}`]));
  expect(seen.get("IOMMU")).toStartWith("ok: on: dmar0, ");
  expect(seen.get("interrupt remapping")).toBe("ok: on");
  expect(seen.get("vfio-pci")).toBe("ok: there");
  expect(seen.get("huge pages")).toStartWith("ok: 4 of 4 pages of 2 MiB free");
  expect(seen.get(blk.address)).toBe(`ok: bound to vfio-pci, IOMMU group ${blk.group}`);
  writeFileSync("/proc/sys/vm/nr_hugepages", "0");
  cli("unbind", blk.address);
  const broken = look(blk.address, "--socket", "/etc/passwd");
  expect(badOf(broken)).toEqual([blk.address, "socket /etc/passwd", "daemon"]);
});
