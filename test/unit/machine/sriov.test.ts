import { afterEach, beforeEach, expect, test } from "bun:test";
import { carryOutSriov, planSriov } from "../../../src/machine/sriov.ts";
import { formatStep } from "../../../src/machine/steps.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import { rejection } from "../../kit/rejection.ts";
import { FakeMachine } from "./fake-machine.ts";

const PF = parsePciAddress("0000:0a:00.0");
const PATH = `/sys/bus/pci/devices/${PF}`;
const VFS = ["0000:0a:10.0", "0000:0a:10.1"].map(parsePciAddress);

let fake: FakeMachine;
beforeEach(async () => {
  fake = await FakeMachine.make();
  const directory = await fake.function({ address: PF, group: 9, driver: "vfio-pci" });
  await fake.files({ [`${directory}/sriov_totalvfs`]: "4\n", [`${directory}/sriov_numvfs`]: "0\n" });
});
afterEach(() => fake[Symbol.asyncDispose]());

async function setVfs(count: number): Promise<string[]> {
  return await carryOutSriov(fake.machine, await planSriov(fake.machine, PF, count, false));
}

test("VFs are made, kept, changed by way of none, and taken away", async () => {
  const plan = await planSriov(fake.machine, PF, 2, false);
  expect(plan.steps.map(formatStep)).toEqual([
    "echo Y > /sys/module/vfio_pci/parameters/enable_sriov",
    `echo 2 > ${PATH}/sriov_numvfs`,
  ]);
  expect(await setVfs(2)).toEqual(VFS);
  fake.log.length = 0;
  expect(await setVfs(2)).toEqual(VFS);
  expect(fake.log).toEqual([]);
  expect(await setVfs(1)).toEqual(VFS.slice(0, 1));
  expect(fake.log).toEqual([`0 > ${PATH}/sriov_numvfs`, `1 > ${PATH}/sriov_numvfs`]);
  expect(await setVfs(0)).toEqual([]);
});

test("VFs that the kernel did not bind are bound", async () => {
  await fake.files({ [`${PATH}/sriov_drivers_autoprobe`]: "0\n" });
  expect(await setVfs(2)).toEqual(VFS);
  for (const vf of VFS) expect(await fake.driverOf(vf)).toBe("vfio-pci");
});

test("VFs in use are not taken away unless forced", async () => {
  await setVfs(1);
  const group = await fake.machine.linkName(`/sys/bus/pci/devices/${VFS[0]}/iommu_group`);
  await fake.exactLink("/proc/77/fd/9", `/dev/vfio/${group}`);
  await fake.files({ "/proc/77/comm": "vfe-vhostd\n" });
  fake.claimed.add(`/dev/vfio/${group}`);
  expect((await rejection(planSriov(fake.machine, PF, 2, false))).message).toContain('process 77 "vfe-vhostd"');
  expect((await planSriov(fake.machine, PF, 2, true)).steps).toHaveLength(2);
  // As many as there are: nothing goes away.
  expect((await planSriov(fake.machine, PF, 1, false)).steps).toEqual([]);
});

test("a PF of another driver, a VF, too many, and no room are refused with what to do", async () => {
  const error = await rejection(planSriov(fake.machine, PF, 5, false));
  expect(error.message).toContain("can have 4 VFs, not 5");
  await setVfs(1);
  expect(await rejection(planSriov(fake.machine, VFS[0]!, 1, false))).toMatchObject({ fix: `its PF is ${PF}` });
  await setVfs(0);
  fake.failures.set(`${PATH}/sriov_numvfs`, 12);
  expect(await rejection(setVfs(2))).toMatchObject({
    code: "outOfMemory",
    fix: expect.stringContaining("pci=realloc,assign-busses"),
  });
  await fake.function({ address: PF, driver: "virtio-pci" });
  expect(await rejection(planSriov(fake.machine, PF, 1, false))).toMatchObject({ fix: `vfe-vhost-cli bind ${PF}` });
});

test("where the VFs cannot be had, there are as many as before, and the error says so", async () => {
  const numvfs = `${PATH}/sriov_numvfs`;
  await setVfs(2);
  fake.log.length = 0;
  fake.failures.set(`4 > ${numvfs}`, 12);
  expect(await rejection(setVfs(4))).toMatchObject({
    code: "outOfMemory",
    message: `${PF} has no room for 4 VFs: \`echo 4 > ${numvfs}\`: ENOMEM, out of memory; it has 2 VFs as before`,
  });
  expect(fake.log).toEqual([0, 4, 2].map((count) => `${count} > ${numvfs}`));
  for (const vf of VFS) expect(await fake.driverOf(vf)).toBe("vfio-pci");
  fake.failures.set(`2 > ${numvfs}`, 5);
  expect((await rejection(setVfs(4))).message).toEndWith("; it has 0 VFs now");
});

test("who may not set a number is told to be root", async () => {
  fake.failures.set("/sys/module/vfio_pci/parameters/enable_sriov", 13);
  expect(await rejection(setVfs(1))).toMatchObject({
    code: "accessDenied",
    message: expect.stringMatching(/ this user may not `echo Y > .*; it has 0 VFs as before$/),
    fix: "run this as root",
  });
});
