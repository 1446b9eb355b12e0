import { expect, test } from "bun:test";
import { rm, symlink } from "node:fs/promises";
import { join } from "node:path";
import { rejection } from "../../kit/rejection.ts";
import { KernelBus, PF, PLAIN, VF } from "./kernel-bus.ts";

/** What a refusal advises can be done, and is what helps. */

test("a VF without its PF: where the kernel wants a token of it, the PF is opened first", async () => {
  await using bus = await KernelBus.create();
  const pfNotFound = { code: "pfNotFound", message: `PF ${PF} has not been added` };
  expect(await rejection(bus.add(VF, {}))).toMatchObject({
    ...pfNotFound,
    fix: `vfe-vhost-cli mgmtpf -a ${PF} first (it may be removed again afterwards)`,
  });
  const driver = join(bus.directory, "bus", PF, "driver");
  await rm(driver);
  await symlink("../../drivers/virtio-pci", driver);
  expect(await rejection(bus.add(VF, {}))).toMatchObject({
    ...pfNotFound,
    fix: `vfe-vhost-cli mgmtpf -a ${PF}; or add the VF without its PF, with --unmanaged`,
  });
});

test("a VF that is there already, and has failed or not", async () => {
  await using bus = await KernelBus.create();
  await bus.add(PLAIN);
  const fix = expect.stringContaining("nothing is to be done");
  expect(await rejection(bus.add(PLAIN))).toMatchObject({ code: "vfExists", fix });
  bus.fn(PLAIN).lose(new Error("unplugged"));
  await bus.until(() => bus.registry.vfInfo(PLAIN).state === "failed");
  expect(await rejection(bus.add(PLAIN))).toMatchObject({
    code: "vfExists",
    message: `VF ${PLAIN} has been added already, and has failed: unplugged`,
    fix: `remove it, then add it again: vfe-vhost-cli vf -r ${PLAIN}`,
  });
  await bus.registry.removeVf(PLAIN);
  expect(await bus.add(PLAIN)).toMatchObject({ state: "idle" });
});

test("the VFs of what is no PF, or of a PF that is not in service", async () => {
  await using bus = await KernelBus.create();
  const { registry } = bus;
  const refused = async (address: typeof PF) => await rejection(Promise.try(() => registry.listVfs(address)));
  expect(await refused(PLAIN)).toMatchObject({ fix: `vfe-vhost-cli mgmtpf -a ${PLAIN}` });
  await bus.add(PLAIN);
  await bus.add(VF);
  for (const [address, message, served] of [
    [PLAIN, `${PLAIN} is served without a PF`, PLAIN],
    [VF, `${VF} is served without a PF`, VF],
    [PF, `VF ${VF} of ${PF} is served without a PF`, VF],
  ] as const) {
    const fix = `vfe-vhost-cli vf -i ${served}, or vf -l --unmanaged`;
    expect(await refused(address)).toMatchObject({ code: "pfNotFound", message, fix });
  }
  await registry.removeVf(VF);
  await registry.addPf(PF);
  await bus.add(VF, {});
  expect(await refused(VF)).toMatchObject({ fix: `name the PF, ${PF}` });
  expect(registry.listVfs(PF)).toHaveLength(1);
});
