import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { chmod } from "node:fs/promises";
import { checkGuest } from "../../../src/machine/doctor/guest.ts";
import { readQemuOptions } from "../../../src/machine/doctor/qemu-options.ts";
import { checkQemuVersion } from "../../../src/machine/doctor/running-qemu.ts";
import { FakeMachine } from "./fake-machine.ts";

const MEMORY = "-object memory-backend-memfd,id=mem,size=4G,share=on -numa node,memdev=mem";
const DISK =
  "-chardev socket,id=char1,path=/tmp/vhost-blk0,server=on " +
  "-device vhost-user-blk-pci,chardev=char1,page-per-vq=on,num-queues=4,disable-legacy=on,disable-modern=off";
const CARD =
  "-chardev socket,id=char0,path=/tmp/vhost-net0,server=on -netdev type=vhost-user,id=vhost1,chardev=char0,queues=4 " +
  "-device virtio-net-pci,netdev=vhost1,vectors=10,page-per-vq=on,mq=on,disable-legacy=on";

let fake: FakeMachine;
beforeEach(async () => {
  fake = await FakeMachine.make();
  await fake.files({
    "/proc/self/mountinfo":
      "30 1 0:31 / /dev/hugepages1G rw - hugetlbfs none rw\n31 1 8:1 / / rw - ext4 /dev/sda1 rw\n32 1 0:5 / /dev/shm rw - tmpfs shm rw\n",
  });
});
afterEach(() => fake[Symbol.asyncDispose]());

async function complaints(text: string): Promise<string[]> {
  const { findings } = await checkGuest(fake.machine, readQemuOptions(text));
  return findings.filter(({ level }) => level !== "ok").map(({ level, check, seen }) => `${level} ${check}: ${seen}`);
}

test("the command lines of the manual are healthy, and their sockets are known", async () => {
  const guest = await checkGuest(fake.machine, readQemuOptions(`qemu-system-x86_64 -m 4096 ${MEMORY} ${DISK} ${CARD}`));
  expect(guest.findings.filter(({ level }) => level !== "ok")).toEqual([]);
  expect(guest.findings.map(({ seen }) => seen)).toEqual([
    'memory-backend-memfd "mem": shared',
    "4 queues",
    "4 pairs of queues",
  ]);
  expect(guest.sockets).toEqual(["/tmp/vhost-blk0", "/tmp/vhost-net0"]);
});

describe("complained about:", () => {
  const cases: Readonly<Record<string, readonly [options: string, says: string]>> = {
    "no memory of its own": [`-m 512 ${DISK}`, "bad guest memory: it is private to QEMU: no device can reach it"],
    "memory that is not shared": [
      `-object memory-backend-memfd,id=mem,size=4G -machine q35,memory-backend=mem ${DISK}`,
      'bad guest memory: memory-backend-memfd "mem" is not shared (share=on)',
    ],
    "memory without a file": [
      `-object memory-backend-ram,id=mem,size=4G,share=on -machine memory-backend=mem ${DISK}`,
      'bad guest memory: memory-backend-ram "mem" has no file',
    ],
    "a file on a disk": [
      `-object memory-backend-file,id=mem,size=4G,share=on,mem-path=/var/ram -numa node,memdev=mem ${DISK}`,
      'bad guest memory: memory-backend-file "mem": /var/ram is on ext4',
    ],
    "a module of memory that is not shared": [
      `${MEMORY} ${DISK} -object memory-backend-ram,id=more,size=1G -device pc-dimm,memdev=more`,
      'bad guest memory: memory-backend-ram "more" is not shared (share=on)',
    ],
    "no device of ours": [MEMORY, "warn guest: it has no vhost-user device"],
    "free-page reporting": [
      `${MEMORY} ${DISK} -device virtio-balloon,free-page-reporting=on`,
      "bad balloon: it reports free pages",
    ],
    "a balloon": [`${MEMORY} ${DISK} -device virtio-balloon-pci,id=b0`, "warn balloon: the guest has one"],
    "virtio-mem": [`${MEMORY} ${DISK} -device virtio-mem-pci,memdev=mem`, "bad virtio-mem: the guest has one"],
    "a vIOMMU": [
      `${MEMORY} ${DISK} -device intel-iommu,intremap=on`,
      "warn vIOMMU: the guest has an IOMMU of its own (intel-iommu)",
    ],
    "a device behind the vIOMMU": [
      `${MEMORY} ${DISK},iommu_platform=on`,
      "bad vhost-user-blk-pci: iommu_platform=on: its addresses would be the vIOMMU's",
    ],
    "an encrypted guest": [
      `${MEMORY} ${DISK} -object sev-guest,id=sev0 -machine q35,confidential-guest-support=sev0`,
      "bad confidential guest: its memory is encrypted",
    ],
    "packed rings": [`${MEMORY} ${DISK},packed=on`, "warn vhost-user-blk-pci: packed=on: not served"],
    "a legacy device": [
      `${MEMORY} ${DISK.replace(",disable-legacy=on", "")}`,
      "warn vhost-user-blk-pci: disable-legacy=on is missing: a legacy driver cannot be served",
    ],
    "doorbells on one page": [
      `${MEMORY} ${DISK.replace("page-per-vq=on,", "")}`,
      "warn vhost-user-blk-pci: page-per-vq=on is missing: kicks leave the guest",
    ],
    "too few vectors": [
      `${MEMORY} ${CARD.replace("vectors=10", "vectors=8")}`,
      "warn virtio-net-pci: vectors=8: its queues share interrupts",
    ],
    "one pair of four": [
      `${MEMORY} ${CARD.replace(",mq=on", "")}`,
      "warn virtio-net-pci: 4 pairs of queues, but no mq=on: the guest uses one",
    ],
    "a file of options": [`${MEMORY} ${DISK} -readconfig vm.cfg`, "warn guest: what -readconfig adds is not checked"],
  };
  for (const [name, [options, says]] of Object.entries(cases)) {
    test(name, async () => expect(await complaints(options)).toEqual([says]));
  }
});

test("command lines are read as a shell, libvirt's JSON, a list and /proc write them", async () => {
  const json =
    `-object '{"qom-type":"memory-backend-file","id":"mem","mem-path":"/dev/shm/x","share":true,"size":4294967296}' ` +
    `-machine 'q35,memory-backend=mem' ${DISK.replace("-device ", '-device "').replace("off", 'off"')} \\\n -S`;
  expect(await complaints(json)).toEqual([]);
  const words = `${MEMORY} ${DISK}`.split(" ");
  expect(await complaints(JSON.stringify(words))).toEqual([]);
  expect(await complaints(["qemu", ...words, ""].join("\0"))).toEqual([]);
  const disk = `-device '{"driver":"vhost-user-blk-pci","chardev":"char1","page-per-vq":true,"disable-legacy":"on","packed":true}'`;
  expect(await complaints(`${MEMORY} ${disk}`)).toEqual(["warn vhost-user-blk-pci: packed=on: not served"]);
  expect(() => readQemuOptions("hello")).toThrow("no options of QEMU");
  const comma = readQemuOptions("-chardev socket,id=a,path=/tmp/a,,b");
  expect(comma[0]?.values.get("path")).toBe("/tmp/a,b");
});

test("the XML of a domain is read: memory, devices, arguments for QEMU", async () => {
  const domain = (access: string, more: string) => `<domain type='kvm'>
    <uuid>ee8b6429-eb1e-45e7-9dab-aff843b99075</uuid>
    <memory unit='GiB'>4</memory>
    <memoryBacking><hugepages><page size='1' unit='GiB'/></hugepages></memoryBacking>
    <cpu><numa><cell id='0' cpus='0-1' memory='4' unit='GiB'${access}/></numa></cpu>
    ${more}
    <qemu:commandline>
      <qemu:arg value='-chardev'/><qemu:arg value='socket,id=char1,path=/tmp/vhost-blk0,server=on'/>
      <qemu:arg value="-device"/>
      <qemu:arg value='vhost-user-blk-pci,chardev=char1,page-per-vq=on,num-queues=4,disable-legacy=on'/>
    </qemu:commandline></domain>`;
  const healthy = domain(" memAccess='shared'", "<memballoon model='none'/>");
  expect(await complaints(healthy)).toEqual([]);
  expect(await checkGuest(fake.machine, readQemuOptions(healthy))).toMatchObject({
    sockets: ["/tmp/vhost-blk0"],
    uuid: "ee8b6429-eb1e-45e7-9dab-aff843b99075",
    hugePages: { page: 2 ** 30, bytes: 4 * 2 ** 30 },
  });
  const broken = domain(
    "",
    `<devices><memballoon model='virtio' freePageReporting='on'/><iommu model='intel'/>
     <memory model='virtio-mem'><target/></memory><launchSecurity type='sev'/>
     <interface type='vhostuser'><source type='unix' path='/tmp/n' mode='server'/><model type='virtio'/>
     <driver queues='2' page_per_vq='on' packed='on'/></interface></devices>`,
  );
  expect((await complaints(broken)).sort()).toEqual([
    "bad balloon: it reports free pages",
    "bad confidential guest: its memory is encrypted",
    'bad guest memory: memory-backend-memfd "domain" is not shared (share=on)',
    "bad virtio-mem: the guest has one",
    "warn vIOMMU: the guest has an IOMMU of its own (intel-iommu)",
    "warn virtio-net-pci: packed=on: not served",
  ]);
});

test("only root's own QEMU is asked for its version", async () => {
  await fake.exactLink("/proc/7/exe", "/usr/bin/qemu-system-x86_64");
  await fake.files({ "/usr/bin/qemu-system-x86_64": "" });
  await chmod(fake.machine.at("/usr/bin/qemu-system-x86_64"), 0o777);
  await fake.exactLink("/proc/8/exe", "/usr/bin/reboot");
  expect(await checkQemuVersion(fake.machine, 7)).toMatchObject([
    { level: "warn", seen: expect.stringContaining("not asked") },
  ]);
  expect(await checkQemuVersion(fake.machine, 8)).toMatchObject([
    { level: "warn", seen: "pid 8 runs /usr/bin/reboot" },
  ]);
  expect(fake.log).toEqual([]);
});
