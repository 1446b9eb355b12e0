import { type CommandLine, type Option, parseCommandLine, UsageError } from "../command-line.ts";
import {
  carryOutBind,
  carryOutUnbind,
  type Outcome,
  type Plan,
  parseAddresses,
  planBind,
  planUnbind,
} from "../machine/bind.ts";
import { Machine } from "../machine/machine.ts";
import type { PciAddress } from "../pci/address.ts";
import { EXIT_FAILURE, failureOf, printFailure } from "./daemon-call.ts";
import { printLine, printSteps, printWarning } from "./machine-output.ts";

const ADDRESSES = { name: "DEVICE", help: "PCI addresses, 0000:af:04.5 or af:04.5", multiple: true };

const DRY_RUN = { type: "boolean", help: "only print what would be written, and where" } as const satisfies Option;

const BIND_OPTIONS = {
  "dry-run": DRY_RUN,
  force: { type: "boolean", help: "also a disk or network card that this machine itself uses" },
} as const satisfies Record<string, Option>;

const BIND_LINE: CommandLine<typeof BIND_OPTIONS> = {
  name: "vfe-vhost-cli bind",
  summary: "Gives functions to vfio-pci, so that the daemon can open them.",
  options: BIND_OPTIONS,
  positionals: [ADDRESSES],
};

const UNBIND_OPTIONS = { "dry-run": DRY_RUN } as const satisfies Record<string, Option>;

const UNBIND_LINE: CommandLine<typeof UNBIND_OPTIONS> = {
  name: "vfe-vhost-cli unbind",
  summary: "Gives functions back to the driver that they would have by themselves.",
  options: UNBIND_OPTIONS,
  positionals: [ADDRESSES],
};

export async function runBind(args: readonly string[]): Promise<number> {
  const { values, positionals } = parseCommandLine(BIND_LINE, args);
  if (positionals.length === 0) throw new UsageError("no device given", BIND_LINE);
  const machine = new Machine();
  return await change(positionals, {
    machine,
    dryRun: values["dry-run"] === true,
    plan: (address) => planBind(machine, address, values.force === true),
    carryOut: (plan) => carryOutBind(machine, plan),
  });
}

export async function runUnbind(args: readonly string[]): Promise<number> {
  const { values, positionals } = parseCommandLine(UNBIND_LINE, args);
  if (positionals.length === 0) throw new UsageError("no device given", UNBIND_LINE);
  const machine = new Machine();
  return await change(positionals, {
    machine,
    dryRun: values["dry-run"] === true,
    plan: (address) => planUnbind(machine, address),
    carryOut: (plan) => carryOutUnbind(machine, plan),
  });
}

interface Change {
  readonly machine: Machine;
  readonly dryRun: boolean;
  plan(address: PciAddress): Promise<Plan>;
  carryOut(plan: Plan): Promise<Outcome>;
}

/** Nothing is changed where one of the functions is refused. */
async function change(texts: readonly string[], { dryRun, plan, carryOut }: Change): Promise<number> {
  const refused: unknown[] = [];
  const plans: Plan[] = [];
  try {
    for (const address of parseAddresses(texts)) {
      await plan(address).then(
        (made) => plans.push(made),
        (error) => refused.push(error),
      );
    }
    for (const error of refused) printFailure(failureOf(error));
    if (refused.length > 0) return EXIT_FAILURE;
    for (const each of plans) {
      if (each.steps.length === 0) printLine(`${each.address}: ${each.driver ?? "no driver"} already`);
      else if (dryRun) printSteps(each.steps);
      else report(each, await carryOut(each));
    }
    return 0;
  } catch (error) {
    printFailure(failureOf(error));
    return EXIT_FAILURE;
  }
}

function report({ address, driver: before }: Plan, { driver, warnings }: Outcome): void {
  printLine(`${address}: ${driver ?? "no driver"} (before: ${before ?? "none"})`);
  for (const warning of warnings) printWarning(warning);
}
