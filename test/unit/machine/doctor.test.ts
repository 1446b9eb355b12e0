import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { chmod, symlink } from "node:fs/promises";
import { createServer } from "node:net";
import { dirname } from "node:path";
import type { Finding } from "../../../src/machine/doctor/finding.ts";
import { examine, type Subjects } from "../../../src/machine/doctor/index.ts";
import { listenersAt } from "../../../src/machine/doctor/listeners.ts";
import { checkQemuVersion } from "../../../src/machine/doctor/running-qemu.ts";
import { checkVms } from "../../../src/machine/doctor/vms.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import { FakeMachine } from "./fake-machine.ts";

const PF = parsePciAddress("0000:0a:00.0");
const PF_PATH = `/sys/bus/pci/devices/${PF}`;
const DISK = parsePciAddress("0000:0b:00.0");
const RPC = "/run/vfe-vhostd/rpc.sock";
const BARS = `${"0x0 0x0 0x0\n".repeat(7)}0xf0000000 0xf000ffff 0x14220c\n`;

const HEALTHY = {
  "/proc/sys/kernel/osrelease": "6.1.0-30-amd64\n",
  "/proc/cmdline": "quiet intel_iommu=on iommu=pt\n",
  "/proc/interrupts": " 24: 1 0 IR-PCI-MSI 1-edge virtio0\n",
  "/sys/class/iommu/dmar0/x": "",
  "/dev/vfio/vfio": "",
  "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit": "65535\n",
  "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages": "32\n",
  "/sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages": "20\n",
  "/sys/devices/system/node/node0/hugepages/hugepages-1048576kB/nr_hugepages": "16\n",
  "/sys/devices/system/node/node0/hugepages/hugepages-1048576kB/free_hugepages": "4\n",
  "/sys/devices/system/node/node1/hugepages/hugepages-1048576kB/nr_hugepages": "16\n",
  "/sys/devices/system/node/node1/hugepages/hugepages-1048576kB/free_hugepages": "16\n",
  "/proc/self/mountinfo":
    "30 1 0:31 / /dev/hugepages1G rw - hugetlbfs none rw,pagesize=1G\n31 1 8:1 / / rw - ext4 /dev/sda1 rw\n",
  "/proc/self/limits": "Max open files 1024 1048576 files\nMax locked memory unlimited unlimited bytes\n",
  "/proc/self/status": "CapEff:\t0000000000000000\n",
  "/etc/passwd": "root:x:0:0:root:/root:/bin/sh\nlibvirt-qemu:x:64055:994::/var/lib/libvirt:/bin/false\n",
};

let fake: FakeMachine;
beforeEach(async () => {
  fake = await FakeMachine.make();
  await fake.files(HEALTHY);
  const bridge = "/sys/devices/pci0000:00/0000:00:01.0";
  const pf = await fake.function({ address: PF, group: 9, driver: "vfio-pci", below: "/0000:00:01.0" });
  await fake.files({
    [`${bridge}/subordinate_bus_number`]: "10\n",
    [`${pf}/sriov_totalvfs`]: "4\n",
    [`${pf}/sriov_numvfs`]: "4\n",
    [`${pf}/sriov_offset`]: "128\n",
    [`${pf}/sriov_stride`]: "1\n",
    [`${pf}/resource`]: BARS,
  });
  await fake.function({ address: DISK, group: 10, driver: "virtio-pci" });
});
afterEach(() => fake[Symbol.asyncDispose]());

async function look(subjects: Partial<Subjects> = {}): Promise<Finding[]> {
  const nothing = { devices: [], sockets: [], rpcSocket: RPC, qemu: undefined, qemuArgs: undefined };
  return await examine(fake.machine, { ...nothing, ...subjects });
}

/** Findings that are not as they should be, "level check: seen → fix". */
async function complaints(subjects: Partial<Subjects> = {}): Promise<string[]> {
  const found = (await look(subjects)).filter(({ level }) => level !== "ok");
  return found.map(({ level, check, seen, fix }) => `${level} ${check}: ${seen} → ${fix}`);
}

test("a healthy machine has nothing to complain about, and every finding says what was seen", async () => {
  const findings = await look({ devices: [PF] });
  expect(findings.filter(({ level }) => level !== "ok")).toEqual([]);
  const seen = findings.map(({ check, seen: text }) => `${check}: ${text}`);
  expect(seen).toContain(`${PF}: bound to vfio-pci, IOMMU group 9`);
  expect(seen).toContain(`${PF} SR-IOV: 4 of 4 VFs`);
  expect(seen).toContain("huge pages: 20 of 32 pages of 1 GiB free (node0 4/16, node1 16/16)");
  // Functions that nobody named may well be the machine's own.
  expect((await look()).map(({ seen: text }) => text)).toContain("virtio-pci has it");
});

describe("what is broken is found, with what to do:", () => {
  const cases: Readonly<
    Record<string, { files?: Record<string, string>; gone?: string; says: RegExp; device?: true }>
  > = {
    "a kernel before SR-IOV": {
      files: { "/proc/sys/kernel/osrelease": "5.4.0" },
      says: /^bad kernel: 5.4.0: .* → use a newer/,
    },
    "a kernel without the fix for HA": {
      files: { "/proc/sys/kernel/osrelease": "5.15.0-91-generic" },
      says: /^warn kernel, HA: .* lacks .*ffed0518d871.* → use kernel 6.0/,
    },
    "an IOMMU that is off": {
      gone: "/sys/kernel/iommu_groups",
      files: { "/proc/cmdline": "quiet" },
      says: /^bad IOMMU: off.* → .*intel_iommu=on iommu=pt/,
    },
    "no interrupt remapping": {
      files: { "/proc/interrupts": " 24: 1 0 PCI-MSI 1-edge" },
      says: /^bad interrupt remapping: off/,
    },
    "interrupt remapping that VFIO does without": {
      files: {
        "/proc/interrupts": "",
        "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts": "Y",
      },
      says: /^warn interrupt remapping: off/,
    },
    "a module that is not loaded": {
      gone: "/sys/bus/pci/drivers/vfio-pci",
      files: { "/lib/modules/6.1.0-30-amd64/modules.dep": "kernel/drivers/vfio/pci/vfio-pci.ko:" },
      says: /^warn vfio-pci: .* → modprobe vfio-pci/,
    },
    "a module that is not there": { gone: "/sys/bus/pci/drivers/vfio-pci", says: /^bad vfio-pci: this kernel/ },
    "no VFIO": {
      gone: "/dev/vfio/vfio",
      says: /^bad VFIO groups: there is no .* → modprobe -a vfio vfio_iommu_type1$/,
    },
    "few DMA mappings": {
      files: { "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit": "64" },
      says: /^warn DMA mappings: 64 .* → options vfio_iommu_type1 dma_entry_limit=/,
    },
    "a function that is not bound": { device: true, says: /^bad 0000:0b.*virtio-pci has it.*cli bind 0000:0b:00.0/ },
    "VFs that vfio-pci does not allow": {
      files: { [`${PF_PATH}/sriov_numvfs`]: "0" },
      says: /^warn 0000:0a:00.0 SR-IOV: .*enable_sriov is N → vfe-vhost-cli sriov/,
    },
    "VFs beyond the bridge's bus numbers": {
      files: { [`${PF_PATH}/sriov_offset`]: "254" },
      says: /^warn 0000:0a:00.0 SR-IOV: 2 of 4 VFs .* → .*pci=realloc,assign-busses/,
    },
    "VFs whose BARs have no place": {
      files: { [`${PF_PATH}/resource`]: BARS.replace("0xf0000000 0xf000ffff", "0x0 0xffff") },
      says: /^bad 0000:0a:00.0 SR-IOV: .*no addresses for the BARs.* → .*pci=realloc/,
    },
    "no huge pages": { gone: "/sys/kernel/mm/hugepages", says: /^warn huge pages: none → echo N/ },
    "little memory to lock": {
      files: { "/proc/self/limits": "Max open files 1024 1048576\nMax locked memory 65536 65536 bytes" },
      says: /^bad locked memory: 65536 .* → LimitMEMLOCK=infinity in its unit, or ulimit -l unlimited/,
    },
    "few open files": {
      files: { "/proc/self/limits": "Max open files 1024 4096\nMax locked memory unlimited unlimited" },
      says: /^warn open files: 4096 .* → LimitNOFILE=1048576 in its unit, or ulimit -n/,
    },
    "AppArmor profiles of VMs": {
      files: {
        "/sys/module/apparmor/parameters/enabled": "Y",
        "/sys/kernel/security/apparmor/profiles": "libvirtd (enforce)\nman (enforce)\n",
      },
      says: /^warn AppArmor: on; enforced: libvirtd \(enforce\) → name the sockets/,
    },
    "SELinux that enforces": {
      files: { "/sys/fs/selinux/enforce": "1" },
      says: /^warn SELinux: enforcing → .*ausearch/,
    },
  };
  for (const [name, { files, gone, says, device }] of Object.entries(cases)) {
    test(name, async () => {
      if (gone !== undefined) await fake.remove(gone);
      if (files !== undefined) await fake.files(files);
      const found = await complaints(device ? { devices: [DISK] } : {});
      expect(found.filter((text) => says.test(text))).toHaveLength(1);
    });
  }

  test("another driver in the IOMMU group", async () => {
    await fake.function({ address: "0000:0a:00.1", group: 9, driver: "e1000e" });
    expect(await complaints({ devices: [PF] })).toEqual([
      expect.stringMatching(/^bad .*0000:0a:00.1 \(e1000e\) → .*bind/),
    ]);
  });

  test("limits are the daemon's where it runs; what root may do counts", async () => {
    await fake.files({
      "/proc/net/unix": `Num RefCount Protocol Flags Type St Inode Path\n0: 00000002 00000000 00010000 0001 01 4711 ${RPC}\n`,
      "/proc/42/comm": "vfe-vhostd\n",
      "/proc/42/limits": "Max open files 1024 1048576\nMax locked memory 65536 65536 bytes",
      "/proc/42/status": "CapEff:\t000001ffffffffff\n",
    });
    await fake.exactLink("/proc/42/fd/5", "socket:[4711]");
    const seen = (await look()).find(({ check }) => check === "locked memory");
    expect(seen).toMatchObject({ level: "ok", seen: "65536 bytes of the daemon (pid 42), which CAP_IPC_LOCK lifts" });
  });
});

describe("a socket", () => {
  const PATH = "/tmp/vhost-net0";

  test("that is not there", async () => {
    expect(await complaints({ sockets: [PATH] })).toEqual([expect.stringMatching(/^warn socket .*not there, nor its/)]);
  });

  test("that is a file", async () => {
    await fake.files({ [PATH]: "" });
    expect(await complaints({ sockets: [PATH] })).toEqual([expect.stringMatching(/^bad socket .*no socket/)]);
  });

  test("that nobody, QEMU, or the daemon listens at", async () => {
    await fake.files({ [`${dirname(PATH)}/x`]: "" });
    const server = createServer().listen(fake.machine.at(PATH));
    await new Promise((resolve) => server.once("listening", resolve));
    try {
      expect(await complaints({ sockets: [PATH] })).toEqual([expect.stringMatching(/^bad socket .*nobody listens/)]);
      await fake.files({
        "/proc/net/unix": `0: 00000002 00000000 00010000 0001 01 99 ${PATH}\n`,
        "/proc/7/comm": "qemu-system-x86\n",
      });
      await fake.exactLink("/proc/7/fd/3", "socket:[99]");
      expect(await complaints({ sockets: [PATH] })).toEqual([]);
      await fake.files({ "/proc/7/comm": "vfe-vhostd\n" });
      expect(await complaints({ sockets: [PATH] })).toEqual([
        expect.stringMatching(/^warn socket .*QEMU as libvirt-qemu may not connect → chown/),
      ]);
    } finally {
      server.close();
    }
  });

  test("that AppArmor keeps from the VM", async () => {
    await fake.files({
      "/sys/module/apparmor/parameters/enabled": "Y",
      "/proc/7/attr/current": "libvirt-1234 (enforce)\n",
      "/proc/7/cmdline": `qemu\0-chardev\0socket,id=c,path=${PATH},server=on\0-device\0vhost-user-blk-pci,chardev=c\0`,
    });
    const said = async () => (await complaints({ qemu: 7 })).filter((text) => text.includes("AppArmor"));
    expect(await said()).toEqual([
      expect.stringMatching(/^bad AppArmor: .*libvirt-1234.*not name \/tmp\/vhost-net0 → add/),
    ]);
    await fake.files({ "/etc/apparmor.d/libvirt/libvirt-1234.files": '  "/tmp/vhost-*" rw,\n' });
    expect(await said()).toEqual([]);
  });
});

test("VFs with one UUID at sockets of two VMs, and a UUID that is not the VM's, are named", async () => {
  const [A, B] = ["aaaaaaaa-eb1e-45e7-9dab-aff843b99075", "bbbbbbbb-eb1e-45e7-9dab-aff843b99075"];
  const rows = [1, 2].map((pid) => `0: 00000002 00000000 00010000 0001 01 ${pid}00 /tmp/s${pid}`);
  await fake.files({
    "/proc/net/unix": rows.join("\n"),
    "/proc/1/cmdline": `qemu\0-uuid\0${A.toUpperCase()}\0`,
    "/proc/2/cmdline": "qemu\0",
  });
  for (const pid of [1, 2]) await fake.exactLink(`/proc/${pid}/fd/3`, `socket:[${pid}00]`);
  const vf = (name: string, pid: number, uuid: string) => ({ vf: name, socket: `/tmp/s${pid}`, uuid });
  expect(await checkVms(fake.machine, [vf("a", 1, A), vf("b", 1, A), vf("c", 2, "")])).toMatchObject([
    { level: "ok", check: "VM UUIDs" },
  ]);
  expect(await checkVms(fake.machine, [vf("a", 1, A), vf("b", 2, A)])).toMatchObject([
    { level: "bad", seen: expect.stringContaining("VFs of 2 VMs: a (pid 1), b (pid 2)") },
  ]);
  expect(await checkVms(fake.machine, [vf("a", 1, B)])).toMatchObject([
    { level: "bad", check: "a", seen: `its VM UUID is ${B}, that of the VM at its socket ${A.toUpperCase()}` },
  ]);
  // It goes into a command that is to be typed.
  await fake.files({ "/proc/1/cmdline": "qemu\0-uuid\0$(reboot)\0" });
  expect(await checkVms(fake.machine, [vf("a", 1, B)])).toMatchObject([{ level: "ok" }]);
});

test("a listener that is made up by another socket's name is none", async () => {
  const row = (inode: number, path: string) => `0: 00000002 00000000 00010000 0001 01 ${inode} ${path}`;
  await fake.files({ "/proc/net/unix": [row(500, "@x"), row(500, "/tmp/victim"), row(501, "/tmp/real")].join("\n") });
  for (const inode of [500, 501]) await fake.exactLink(`/proc/9/fd/${inode}`, `socket:[${inode}]`);
  expect(await listenersAt(fake.machine, "/tmp/victim")).toBeUndefined();
  expect(await listenersAt(fake.machine, "/tmp/real")).toMatchObject([{ pid: 9 }]);
});

test("a QEMU is asked for its version only where nobody but root can change what is started", async () => {
  const path = "/usr/bin/qemu-system-x86_64";
  let pid = 0;
  const asked = async (program: string) => {
    await fake.exactLink(`/proc/${++pid}/exe`, program);
    return (await checkQemuVersion(fake.machine, pid))[0]?.seen;
  };
  await fake.files({ [path]: "", "/home/x": "" });
  // The root directory of this test is in a directory for all.
  await chmod(fake.machine.at("/"), 0o755);
  expect(await asked(path)).not.toContain("not root's");
  expect(await asked("/usr/../usr/bin/qemu-system-x86_64")).toContain("not root's");
  await symlink(fake.machine.at("/usr/bin"), fake.machine.at("/home/bin"));
  expect(await asked("/home/bin/qemu-system-x86_64")).toContain("not root's");
  await chmod(fake.machine.at("/usr/bin"), 0o777);
  expect(await asked(path)).toContain("not root's");
});
