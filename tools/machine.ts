import type { MachineOptions } from "../test/kit/machine/description.ts";
import { KERNELS, type KernelName } from "../test/kit/machine/image.ts";
import { type MachineCommand, MachineRun } from "../test/kit/machine/machine-run.ts";
import { buildOwnKernel } from "../test/kit/machine/own-kernel.ts";
import { defineTask, Failure, UsageError } from "./command.ts";
import { prepare } from "./preparation.ts";

/**
 * `./dev machine [--kernel 6.1|6.12|iommufd] [--no-sriov] [--seconds N] -- COMMAND…`: runs one command in the machine of
 * the vfio tier, with this machine's files (read-only below a file system in memory) and in this checkout, and shows what
 * it writes. The exit code is the command's; 1 with the end of the console where the machine died or took too long.
 *
 *     ./dev machine -- ls /sys/kernel/iommu_groups
 *     ./dev machine --kernel iommufd -- sh -c 'ls /dev/iommu; bun test ./test/vfio/boots.test.ts'
 */
export default defineTask({
  name: "machine",
  description: "Run one command in a VM with an IOMMU, VFIO and virtio functions: ./dev machine -- COMMAND…",
  args: {
    kernel: { type: "string", default: "6.12", description: `The VM's kernel: ${KERNELS.join(", ")}` },
    iommufd: { type: "boolean", description: "The same as --kernel iommufd" },
    plain: { type: "boolean", description: "Debian's own QEMU, which has no SR-IOV" },
    "narrow-iommu": { type: "boolean", description: "IOMMU addresses of 39 bits in place of 48" },
    seconds: { type: "string", default: "300", description: "After which the VM is ended" },
    command: { type: "positional", required: false, description: "What is run, in the checkout" },
  },
  run: async ({ kernel: name, iommufd, plain, "narrow-iommu": narrow, seconds, _: words }) => {
    const kernel = iommufd ? "iommufd" : KERNELS.find((known) => known === name);
    if (kernel === undefined) throw new UsageError(`--kernel is "${name}", must be one of ${KERNELS.join(", ")}`);
    if (!/^[1-9]\d*$/.test(seconds)) throw new UsageError(`--seconds is "${seconds}", must be a whole number above 0`);
    if (words.length === 0) throw new UsageError("which command?");
    await prepare("native");
    await bringKernel(kernel);
    const options = { kernel, sriov: !plain, addressBits: narrow ? 39 : 48 } as const;
    await using machine = await startMachine(options, { words, directory: process.cwd() });
    const interrupted = Promise.withResolvers<number>();
    for (const signal of ["SIGINT", "SIGTERM"] as const) {
      process.once(signal, () => interrupted.resolve(signal === "SIGINT" ? 130 : 143));
    }
    const finished = machine.finished(Number(seconds) * 1000, (text) => process.stdout.write(text));
    return await Promise.race([finished, interrupted.promise]).catch((error: Error) => {
      throw new Failure(error.message);
    });
  },
});

/** @param start others than MachineRun.start in its own tests. @throws Failure when what it boots cannot be had */
export async function startMachine(
  options: MachineOptions,
  command: MachineCommand,
  start = MachineRun.start,
): Promise<MachineRun> {
  return await start(options, command).catch((error: Error) => {
    throw new Failure(`no VM with an IOMMU: ${error.message}`);
  });
}

/** Our own kernel is built when it is asked for. @throws Failure */
async function bringKernel(kernel: KernelName): Promise<void> {
  if (kernel !== "iommufd") return;
  await buildOwnKernel((text) => console.error(text)).catch((error: Error) => {
    throw new Failure(`the kernel with iommufd could not be built: ${error.message}`);
  });
}
