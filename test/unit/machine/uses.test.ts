import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { planBind } from "../../../src/machine/bind.ts";
import { usesOf } from "../../../src/machine/uses.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import { rejection } from "../../kit/rejection.ts";
import { FakeMachine } from "./fake-machine.ts";

const ADDRESS = parsePciAddress("0000:01:00.0");
const MOUNT = "31 1 252:1 / /srv rw shared:1 - ext4 /dev/vda1 rw\n";
const ROUTES = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n";
const V4 = "\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n";

let fake: FakeMachine;
let directory: string;
beforeEach(async () => {
  fake = await FakeMachine.make();
  directory = await fake.function({ address: ADDRESS, group: 12, driver: "virtio-pci" });
});
afterEach(() => fake[Symbol.asyncDispose]());

describe("a disk", () => {
  beforeEach(async () => {
    await fake.classDevice("block", "vda", directory, "252:0");
    await fake.classDevice("block", "vda1", directory, "252:1");
    // Another function's disk is nobody's business here.
    const other = await fake.function({ address: "0000:02:00.0" });
    await fake.classDevice("block", "vdb", other, "252:16");
    await fake.files({ "/proc/self/mountinfo": "32 1 252:16 / / rw - ext4 /dev/vdb rw\n" });
  });

  test("nobody uses", async () => {
    expect(await usesOf(fake.machine, ADDRESS)).toEqual([]);
  });

  test("with a mounted partition, which is refused unless forced", async () => {
    await fake.files({ "/proc/self/mountinfo": MOUNT });
    expect(await usesOf(fake.machine, ADDRESS)).toEqual(["vda1 is mounted at /srv"]);
    const error = await rejection(planBind(fake.machine, ADDRESS, false));
    expect(error).toMatchObject({ code: "busy", message: expect.stringContaining("vda1 is mounted at /srv") });
    expect((await planBind(fake.machine, ADDRESS, true)).steps).toHaveLength(3);
  });

  test("whose file system has a device number of its own", async () => {
    await fake.files({ "/proc/self/mountinfo": "31 1 0:40 / /srv rw - btrfs /dev/vda rw\n" });
    expect(await usesOf(fake.machine, ADDRESS)).toEqual(["vda is mounted at /srv"]);
  });

  test("that is one of several of a btrfs", async () => {
    await fake.files({ "/sys/fs/btrfs/some-id/devices/vda/dev": "" });
    expect(await usesOf(fake.machine, ADDRESS)).toEqual(["vda is part of a mounted btrfs"]);
  });

  test("that is swapped to", async () => {
    await fake.files({ "/proc/swaps": "Filename Type Size Used Priority\n/dev/vda1 partition 1 0 -2\n" });
    expect(await usesOf(fake.machine, ADDRESS)).toEqual(["vda1 is swap"]);
  });

  test("below an encrypted volume of a RAID", async () => {
    await fake.files({
      "/sys/class/block/md0/dev": "9:0\n",
      "/sys/class/block/dm-3/dev": "253:3\n",
      "/sys/class/block/dm-3/dm/name": "secret\n",
      "/proc/self/mountinfo": "31 1 253:3 / /srv rw - ext4 /dev/mapper/secret rw\n",
    });
    await fake.link("/sys/class/block/vda1/holders/md0", "/sys/class/block/md0");
    await fake.link("/sys/class/block/md0/holders/dm-3", "/sys/class/block/dm-3");
    const [use] = await usesOf(fake.machine, ADDRESS);
    expect(use).toBe("vda1 is part of md0: md0 is part of dm-3 (secret): dm-3 is mounted at /srv");
  });

  test("that only the kernel knows to be in use", async () => {
    fake.claimed.add("/dev/vda1");
    expect(await usesOf(fake.machine, ADDRESS)).toEqual([expect.stringContaining("vda1 is held by the kernel")]);
  });

  test("that a process has open", async () => {
    await fake.exactLink("/proc/5/fd/3", "/dev/vda");
    await fake.files({ "/proc/5/comm": "qemu-system-x86\n" });
    expect(await usesOf(fake.machine, ADDRESS)).toEqual(["vda is open in qemu-system-x86 (pid 5)"]);
  });

  test("of a VF goes with its PF", async () => {
    await fake.files({ "/proc/self/mountinfo": MOUNT });
    const pf = parsePciAddress("0000:02:00.0");
    expect(await usesOf(fake.machine, pf, [ADDRESS])).toEqual([`its VF ${ADDRESS}: vda1 is mounted at /srv`]);
  });
});

test("an NVMe disk with several ways stands below its subsystem", async () => {
  const subsystem = "/sys/devices/virtual/nvme-subsystem/nvme-subsys0";
  await fake.files({ [`${directory}/nvme/nvme0/state`]: "live", [`${subsystem}/nvme0n1/dev`]: "259:0\n" });
  await fake.link(`${subsystem}/nvme0`, `${directory}/nvme/nvme0`);
  await fake.link("/sys/class/nvme-subsystem/nvme-subsys0", subsystem);
  await fake.link("/sys/class/block/nvme0n1", `${subsystem}/nvme0n1`);
  await fake.files({ "/proc/self/mountinfo": "31 1 259:0 / /srv rw - ext4 /dev/nvme0n1 rw\n" });
  expect(await usesOf(fake.machine, ADDRESS)).toEqual(["nvme0n1 is mounted at /srv"]);
});

describe("a network card", () => {
  beforeEach(() => fake.classDevice("net", "eth7", directory));

  test("without the default route", async () => {
    await fake.files({
      "/proc/net/route": `${ROUTES}eth7\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\neth0${V4}`,
      // A route that refuses.
      "/proc/net/ipv6_route": `${"0".repeat(32)} 00 ${"0".repeat(32)} 00 ${"0".repeat(32)} ffffffff 1 0 00200200 eth7\n`,
    });
    expect(await usesOf(fake.machine, ADDRESS)).toEqual([]);
  });

  test("with it", async () => {
    await fake.files({ "/proc/net/route": `${ROUTES}eth7${V4}` });
    expect(await usesOf(fake.machine, ADDRESS)).toEqual(["eth7 carries the default route (IPv4)"]);
  });

  test("with that of IPv6", async () => {
    const line = `${"0".repeat(32)} 00 ${"0".repeat(32)} 00 fe80${"0".repeat(28)} 00000400 1 0 00000003     eth7\n`;
    await fake.files({ "/proc/net/ipv6_route": line });
    expect(await usesOf(fake.machine, ADDRESS)).toEqual(["eth7 carries the default route (IPv6)"]);
  });

  test("beneath a VLAN on a bridge on a bond", async () => {
    await fake.files({ "/proc/net/route": `${ROUTES}br0.5${V4}`, "/sys/class/net/br0.5/mtu": "1500" });
    await fake.link("/sys/class/net/br0.5/lower_br0", "/sys/class/net/br0");
    await fake.files({ "/sys/class/net/br0/mtu": "1500", "/sys/class/net/bond0/mtu": "1500" });
    await fake.link("/sys/class/net/bond0/master", "/sys/class/net/br0");
    await fake.link(`${directory}/virtio0/net/eth7/master`, "/sys/class/net/bond0");
    expect(await usesOf(fake.machine, ADDRESS)).toEqual(["eth7 carries the default route (IPv4 through br0.5)"]);
  });
});
