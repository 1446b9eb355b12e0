import { expect, spyOn, test } from "bun:test";
import { VhostdError } from "../../../src/base/errors.ts";
import { carryOutBind, carryOutUnbind, parseAddresses, planBind, planUnbind } from "../../../src/machine/bind.ts";
import { formatStep } from "../../../src/machine/steps.ts";
import { ENABLE_SRIOV } from "../../../src/machine/vfs.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import { rejection } from "../../kit/rejection.ts";
import { FakeMachine } from "./fake-machine.ts";

const ADDRESS = parsePciAddress("0000:01:00.0");
const PATH = `/sys/bus/pci/devices/${ADDRESS}`;

async function makeWithDisk(): Promise<FakeMachine> {
  const fake = await FakeMachine.make();
  await fake.function({ address: ADDRESS, group: 12, driver: "virtio-pci" });
  return fake;
}

test("a function is bound and given back, step by step, and twice is once", async () => {
  await using fake = await makeWithDisk();
  const { machine } = fake;
  const plan = await planBind(machine, ADDRESS, false);
  const lines = plan.steps.map(formatStep);
  expect(lines).toEqual([
    `echo vfio-pci > ${PATH}/driver_override`,
    `echo ${ADDRESS} > ${PATH}/driver/unbind`,
    `echo ${ADDRESS} > /sys/bus/pci/drivers_probe`,
  ]);
  expect(fake.log).toEqual([]);
  expect(await carryOutBind(machine, plan)).toEqual({ address: ADDRESS, driver: "vfio-pci", warnings: [] });
  // What was printed is what was written.
  expect(fake.log.map((line) => `echo ${line}`)).toEqual(lines);
  expect(await fake.driverOf(ADDRESS)).toBe("vfio-pci");
  expect((await planBind(machine, ADDRESS, false)).steps).toEqual([]);

  const back = await planUnbind(machine, ADDRESS);
  expect(await carryOutUnbind(machine, back)).toEqual({ address: ADDRESS, driver: "virtio-pci", warnings: [] });
  expect(await machine.text(`${PATH}/driver_override`)).toBe("(null)");
  expect((await planUnbind(machine, ADDRESS)).steps).toEqual([]);
});

test("the module is loaded where it is not there", async () => {
  await using fake = await makeWithDisk();
  await fake.remove("/sys/bus/pci/drivers/vfio-pci");
  await carryOutBind(fake.machine, await planBind(fake.machine, ADDRESS, false));
  expect(fake.log[0]).toBe("modprobe vfio-pci");
});

test("where vfio-pci refuses, the former driver has the function again", async () => {
  await using fake = await makeWithDisk();
  fake.refusing.add("vfio-pci");
  const error = await rejection(carryOutBind(fake.machine, await planBind(fake.machine, ADDRESS, false)));
  expect(error.message).toContain(
    "drivers_probe` had no effect: the function has no driver; it has virtio-pci as before",
  );
  expect(await fake.driverOf(ADDRESS)).toBe("virtio-pci");
});

test("the driver's module is loaded again when a function comes back to it", async () => {
  await using fake = await makeWithDisk();
  await carryOutBind(fake.machine, await planBind(fake.machine, ADDRESS, false));
  fake.unloaded.add("virtio-pci");
  const outcome = await carryOutUnbind(fake.machine, await planUnbind(fake.machine, ADDRESS));
  expect(outcome.driver).toBe("virtio-pci");
  expect(fake.log.at(-1)).toBe(`modprobe pci:${ADDRESS}`);
});

test("an id in new_id keeps a function at vfio-pci, and the error says how to take it away", async () => {
  await using fake = await FakeMachine.make();
  await fake.function({ address: ADDRESS, group: 12, driver: "vfio-pci" });
  const error = await rejection(carryOutUnbind(fake.machine, await planUnbind(fake.machine, ADDRESS)));
  expect(error).toMatchObject({ code: "busy", fix: expect.stringContaining("echo 0x1af4 0x1042 > ") });
});

test("without an IOMMU group nothing is bound, and the fix names the processor's words", async () => {
  await using fake = await FakeMachine.make();
  await fake.function({ address: ADDRESS, driver: "virtio-pci" });
  const error = await rejection(planBind(fake.machine, ADDRESS, true));
  expect(error).toMatchObject({ code: "iommuGroup", fix: expect.stringContaining("intel_iommu=on iommu=pt") });
});

test("other drivers in the group are named; functions without a driver are none of them", async () => {
  await using fake = await makeWithDisk();
  await fake.function({ address: "0000:01:01.0", group: 12, driver: "e1000e" });
  await fake.function({ address: "0000:00:1c.0", group: 12, driver: "shpchp", class: "0x060400" });
  await fake.function({ address: "0000:01:02.0", group: 12 });
  await fake.function({ address: "0000:01:03.0", group: 12, driver: "pci-stub" });
  const { warnings } = await carryOutBind(fake.machine, await planBind(fake.machine, ADDRESS, false));
  expect(warnings).toHaveLength(1);
  expect(warnings[0]).toContain("drivers have 0000:00:1c.0 (shpchp), 0000:01:01.0 (e1000e);");
  expect(warnings[0]).toContain(
    "echo 0000:00:1c.0 > /sys/bus/pci/drivers/shpchp/unbind; vfe-vhost-cli bind 0000:01:01.0;",
  );
});

test("a function that a process has open is not taken from it", async () => {
  await using fake = await makeWithDisk();
  await carryOutBind(fake.machine, await planBind(fake.machine, ADDRESS, false));
  fake.claimed.add("/dev/vfio/12");
  expect((await rejection(planUnbind(fake.machine, ADDRESS))).message).toContain("a process that cannot be seen");
  await fake.exactLink("/proc/77/fd/9", "/dev/vfio/12");
  await fake.files({ "/proc/77/comm": "vfe-vhostd\n" });
  expect((await rejection(planUnbind(fake.machine, ADDRESS))).message).toContain('held by process 77 "vfe-vhostd"');
});

/** A PF of vfio-pci with two VFs. */
async function makeWithVfs(): Promise<FakeMachine> {
  const fake = await FakeMachine.make();
  const pf = await fake.function({ address: ADDRESS, group: 12, driver: "virtio-pci" });
  await carryOutBind(fake.machine, await planBind(fake.machine, ADDRESS, false));
  await fake.files({ [`${pf}/sriov_totalvfs`]: "2\n" });
  await fake.write(ENABLE_SRIOV, "Y");
  await fake.write(`${PATH}/sriov_numvfs`, "2");
  return fake;
}

test("a PF loses its VFs first, and the dry run tells it", async () => {
  await using fake = await makeWithVfs();
  await fake.write(ENABLE_SRIOV, "N");
  expect((await planUnbind(fake.machine, ADDRESS)).steps).toHaveLength(3);
  await fake.write(ENABLE_SRIOV, "Y");
  const plan = await planUnbind(fake.machine, ADDRESS);
  expect(plan.steps.map(formatStep)).toEqual([
    `echo 0 > ${PATH}/sriov_numvfs`,
    `echo  > ${PATH}/driver_override`,
    `echo ${ADDRESS} > ${PATH}/driver/unbind`,
    `echo ${ADDRESS} > /sys/bus/pci/drivers_probe`,
  ]);
  expect(await carryOutUnbind(fake.machine, plan)).toMatchObject({ driver: "virtio-pci" });
  expect(await fake.machine.text(`${PATH}/sriov_numvfs`)).toBe("0");
});

test("a PF is not taken away, nor bound, from under a VF that a process has open", async () => {
  await using fake = await makeWithVfs();
  const vf = "0000:0a:10.1";
  const group = await fake.machine.linkName(`/sys/bus/pci/devices/${vf}/iommu_group`);
  await fake.exactLink("/proc/77/fd/9", `/dev/vfio/${group}`);
  await fake.files({ "/proc/77/comm": "vfe-vhostd\n" });
  // Anybody may have a file that is called like the group's.
  expect((await planUnbind(fake.machine, ADDRESS)).steps).not.toEqual([]);
  fake.claimed.add(`/dev/vfio/${group}`);
  const refused = {
    code: "busy",
    message: expect.stringMatching(new RegExp(`^${vf}, .* held by process 77 "vfe-vhostd"`)),
  };
  const unbind = await rejection(planUnbind(fake.machine, ADDRESS));
  expect(unbind).toMatchObject({ ...refused, fix: `\`vfe-vhost-cli vf -r ${vf}\`, or end that process` });
  // A driver of its own may have made the VFs, too.
  await fake.link(`${await fake.machine.resolve(PATH)}/driver`, "/sys/bus/pci/drivers/virtio-pci");
  expect(await rejection(planBind(fake.machine, ADDRESS, false))).toMatchObject(refused);
  expect((await planBind(fake.machine, ADDRESS, true)).steps).toHaveLength(3);
});

test("a PF is not taken away from under a VF that is this machine's way to the network", async () => {
  await using fake = await makeWithVfs();
  const directory = (await fake.machine.resolve("/sys/bus/pci/devices/0000:0a:10.0"))!;
  await fake.classDevice("net", "eth3", directory);
  await fake.files({
    "/proc/net/route": "Iface\tDestination\tGateway\tFlags\neth3\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\n",
  });
  const error = await rejection(planUnbind(fake.machine, ADDRESS));
  expect(error).toMatchObject({ code: "busy", fix: "end that use first" });
});

test("who may not is told to be root, with the step as it is typed", async () => {
  await using fake = await makeWithDisk();
  fake.failures.set(`${PATH}/driver_override`, 13);
  const step = `this user may not \`echo vfio-pci > ${PATH}/driver_override\``;
  expect(await rejection(carryOutBind(fake.machine, await planBind(fake.machine, ADDRESS, false)))).toMatchObject({
    code: "accessDenied",
    message: `${ADDRESS} was not bound: ${step}; it has virtio-pci as before`,
    fix: "run this as root",
  });
  fake.failures.clear();
  await carryOutBind(fake.machine, await planBind(fake.machine, ADDRESS, false));
  fake.failures.set(`${PATH}/driver_override`, 13);
  expect(await rejection(carryOutUnbind(fake.machine, await planUnbind(fake.machine, ADDRESS)))).toMatchObject({
    message: `this user may not \`echo  > ${PATH}/driver_override\``,
    fix: "run this as root",
  });
  // What else the kernel says is said of the same line.
  fake.failures.set(`${PATH}/driver_override`, 12);
  expect((await rejection(carryOutUnbind(fake.machine, await planUnbind(fake.machine, ADDRESS)))).message).toBe(
    `\`echo  > ${PATH}/driver_override\`: ENOMEM, out of memory`,
  );
});

test("a module that another user cannot load", async () => {
  await using fake = await makeWithDisk();
  await fake.remove("/sys/bus/pci/drivers/vfio-pci");
  using _run = spyOn(fake, "run").mockRejectedValue(new VhostdError("io", "modprobe vfio-pci failed"));
  const plan = await planBind(fake.machine, ADDRESS, false);
  using user = spyOn(process, "geteuid").mockReturnValue(1000);
  expect(await rejection(carryOutBind(fake.machine, plan))).toMatchObject({
    message: `${ADDRESS} was not bound: this user may not \`modprobe vfio-pci\`; it has virtio-pci as before`,
    fix: "run this as root",
  });
  user.mockReturnValue(0);
  expect(await rejection(carryOutBind(fake.machine, plan))).toMatchObject({ fix: expect.stringContaining("dmesg") });
});

test("addresses are read in any spelling, each once; one that is not there is said", async () => {
  expect(parseAddresses(["01:00.0", "0000:01:00.0"])).toEqual([ADDRESS]);
  await using fake = await FakeMachine.make();
  expect((await rejection(planBind(fake.machine, ADDRESS, false))).message).toContain("no function 0000:01:00.0");
});
