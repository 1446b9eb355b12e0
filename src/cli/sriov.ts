import { type CommandLine, type Option, parseCommandLine, UsageError } from "../command-line.ts";
import { Machine } from "../machine/machine.ts";
import { carryOutSriov, planSriov } from "../machine/sriov.ts";
import { parsePciAddress } from "../pci/address.ts";
import { EXIT_FAILURE, failureOf, printFailure } from "./daemon-call.ts";
import { printLine, printSteps } from "./machine-output.ts";

const OPTIONS = {
  "dry-run": { type: "boolean", help: "only print what would be written, and where" },
  force: { type: "boolean", help: "also where VFs that go away are in use" },
} as const satisfies Record<string, Option>;

const LINE: CommandLine<typeof OPTIONS> = {
  name: "vfe-vhost-cli sriov",
  summary: "Gives a PF that vfio-pci has a number of VFs, and prints their addresses.",
  options: OPTIONS,
  positionals: [
    { name: "PF", help: "PCI address, 0000:af:00.2 or af:00.2" },
    { name: "N", help: "how many; 0 takes all away" },
  ],
};

export async function runSriov(args: readonly string[]): Promise<number> {
  const { values, positionals } = parseCommandLine(LINE, args);
  const [pf, count = ""] = positionals;
  if (pf === undefined || !/^\d{1,5}$/.test(count)) throw new UsageError("give a PF and a number of VFs", LINE);
  const machine = new Machine();
  try {
    const plan = await planSriov(machine, parsePciAddress(pf), Number(count), values.force === true);
    if (values["dry-run"] === true) printSteps(plan.steps);
    else for (const vf of await carryOutSriov(machine, plan)) printLine(vf);
    return 0;
  } catch (error) {
    printFailure(failureOf(error));
    return EXIT_FAILURE;
  }
}
