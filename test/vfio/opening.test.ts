import { afterAll, afterEach, beforeAll, describe, expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { readFile, writeFile } from "node:fs/promises";
import { Deadline } from "../../src/base/deadline.ts";
import type { VfioInterface } from "../../src/pci/vfio/address-space.ts";
import { Machine } from "../kit/machine/inside.ts";
import { PciAddress } from "../kit/machine/pci-function.ts";
import { refusal, SpaceLab, soon, TOKEN } from "../kit/machine/space-lab.ts";

/** Opening functions in address spaces of kernel VFIO, and every reason for which that is refused. */

const TIMEOUT = 120_000;
/** vfio-pci takes part in SR-IOV only when told. */
const ENABLE_SRIOV = "/sys/module/vfio_pci/parameters/enable_sriov";
const INTERFACES: readonly VfioInterface[] = existsSync("/dev/iommu") ? ["group", "iommufd"] : ["group"];

let lab: SpaceLab;

beforeAll(async () => {
  lab = await SpaceLab.create();
}, TIMEOUT);
afterEach(async () => {
  await lab.reset();
}, TIMEOUT);
afterAll(async () => {
  await lab?.[Symbol.asyncDispose]();
}, TIMEOUT);

/** Some kernels' drivers of bridges keep VFIO from having what is behind one bridge. */
function releaseBridges(id: string): void {
  for (const address of lab.machine.function(id).groupMembers) {
    const member = new PciAddress(address);
    if (member.attribute("class").startsWith("0x0604")) member.release();
  }
}

/** Somebody else has a file of VFIO open. */
async function holder(path: string) {
  const child = Bun.spawn(["sh", "-c", `exec sleep 300 <>${path}`], { stdout: "ignore", stderr: "inherit" });
  const link = () => readFile(`/proc/${child.pid}/comm`, "utf8");
  await soon("the holder").poll(async () => (await link()).trim() === "sleep" || undefined, 5);
  return {
    pid: child.pid,
    end: async () => {
      child.kill();
      await child.exited;
    },
    [Symbol.asyncDispose]: async () => {
      child.kill();
      await child.exited;
    },
  };
}

describe.each(INTERFACES)("over %s", (kind) => {
  /** The file that is in the way of everybody else when it is open. */
  const fileOf = (id: string) => `/dev/vfio/${lab.machine.function(id).group}`;

  test(
    "an opening whose time is over leaves nothing open",
    async () => {
      const domain = lab.domain(kind);
      const entry = await lab.entry("blk0");
      for (const time of [1, 10, 40]) {
        const error = await refusal(domain.open(entry, Deadline.after(time, "opening")));
        expect(error.code).toBe("timedOut");
      }
      await lab.attach(domain, "blk0");
    },
    TIMEOUT,
  );

  test(
    "a function that another process holds is refused, naming the process; freed meanwhile it works",
    async () => {
      await using other = await holder(fileOf("blk0"));
      const entry = await lab.entry("blk0");
      const error = await refusal(lab.domain(kind).open(entry, soon("opening")));
      expect(error.code).toBe("busy");
      expect(error.message).toContain(`process ${other.pid} "sleep"`);
      const domain = lab.domain(kind);
      const opening = domain.open(entry, soon("opening"));
      await other.end();
      await lab.close(domain, await opening);
    },
    TIMEOUT,
  );

  test(
    "a function that this daemon has for another VM is refused, saying so",
    async () => {
      await lab.attach(lab.domain(kind, "VM 1"), "blk0");
      const error = await refusal(lab.domain(kind, "VM 2").open(await lab.entry("blk0"), soon("opening")));
      expect(error.code).toBe("busy");
      expect(error.message).toContain(`this daemon, process ${process.pid}`);
    },
    TIMEOUT,
  );

  test(
    "a function that shares its group with another driver's is refused, naming both; another driver's too",
    async () => {
      const [first, second] = ["bridged0", "bridged1"] as const;
      releaseBridges(first);
      expect(await refusal(lab.domain(kind).open(await lab.entry(first), soon("opening")))).toMatchObject({
        code: "iommuGroupBind",
        message: expect.stringContaining("virtio-pci"),
      });
      using _first = lab.machine.function(first).bind();
      const error = await refusal(lab.domain(kind).open(await lab.entry(first), soon("opening")));
      expect(error.code).toBe("iommuGroup");
      expect(error.message).toContain(`${lab.address(second)} (driver virtio-pci)`);
      using _second = lab.machine.function(second).bind();
      const domain = lab.domain(kind);
      const one = await lab.attach(domain, first);
      const other = await lab.attach(domain, second);
      await lab.close(domain, one);
      const busy = await refusal(lab.domain(kind, "VM 2").open(await lab.entry(first), soon("opening")));
      expect(busy.code).toBe("busy");
      expect(busy.message).toContain(`this daemon, process ${process.pid}`);
      await lab.close(domain, await lab.attach(domain, first));
      await lab.close(domain, other);
    },
    TIMEOUT,
  );
});

test(
  "auto is iommufd where the kernel has it; asked for where it has not, it is refused with what to do",
  async () => {
    const available = existsSync("/dev/iommu");
    const { space, domain } = lab.space("auto");
    await lab.attach(domain, "blk0");
    expect(space.interface).toBe(available ? "iommufd" : "group");
    if (available) return;
    expect(await refusal(lab.domain("iommufd").open(await lab.entry("blk1"), soon("opening")))).toMatchObject({
      code: "iommuContainer",
      message: "there is no /dev/iommu",
      fix: expect.stringContaining("CONFIG_IOMMUFD"),
    });
  },
  TIMEOUT,
);

const { sriov } = Machine.here().description;
const SKIP = sriov ? "" : " [skip: this QEMU emulates no SR-IOV]";

test.skipIf(!sriov)(
  `a PF and its VFs are opened with the token; without that of the PF, a VF is refused${SKIP}`,
  async () => {
    const pf = lab.machine.function("pf0");
    await writeFile(ENABLE_SRIOV, "Y");
    await using undo = new AsyncDisposableStack();
    undo.use(pf.bind());
    const vfs = await lab.machine.enableVfs(pf, 1);
    undo.defer(() => vfs[Symbol.dispose]());
    const [vf] = pf.vfs;
    // The kernel gives VFs of such a PF to vfio-pci by itself.
    await soon("the VF's driver").poll(() => vf!.driver === "vfio-pci" || undefined, 10);
    const { space, domain } = lab.space("auto");
    await lab.open(domain, "pf0");
    // The kernels of this machine take a token with the group's file only.
    expect(space.interface).toBe("group");
    const wrong = lab.space("auto", "VM 1", TOKEN.replaceAll("5", "6")).domain;
    const error = await refusal(lab.open(wrong, vf!.address));
    expect(error.code).toBe("accessDenied");
    expect(error.message).toContain(pf.address);
    const right = lab.domain("auto", "VM 2");
    await lab.open(right, vf!.address);
    if (existsSync("/dev/iommu")) {
      const untaken = await refusal(lab.open(lab.domain("iommufd", "VM 3"), vf!.address));
      expect(untaken).toMatchObject({ code: "notSupported", fix: expect.stringContaining('vfio = "group"') });
    }
    await lab.reset();
  },
  TIMEOUT,
);
