import { join } from "node:path";

/** The environment variable that names the directory of the programs that a run has built for its machines. */
export const PROGRAMS_VARIABLE = "VFE_TEST_PROGRAMS";

/** What tests start in a machine beside themselves, by the name of the executable: its source, from the top of the checkout. */
export const MACHINE_PROGRAMS = {
  "vfe-vhostd": "bin/vhostd.ts",
  "vfe-vhost-cli": "bin/vfe-vhost-cli.ts",
  "frontend-program": "test/kit/machine/frontend-program.ts",
  "former-program": "test/kit/machine/former-program.ts",
  "locked-program": "test/kit/machine/locked-program.ts",
  "adoption-program": "test/kit/machine/adoption-program.ts",
  "vfe-vhostd-ha": "bin/vhostd-ha.ts",
} as const;
export type MachineProgram = keyof typeof MACHINE_PROGRAMS;

const ROOT = join(import.meta.dir, "../../..");

/**
 * Of such a process: an executable unpacks its native module into its temporary directory and leaves it there. This one is
 * in the machine's memory.
 */
export const PROGRAM_ENVIRONMENT = { TMPDIR: "/run" } as const;

/**
 * The command line of a program: the executable that was built for this run, which is what users install and starts in a
 * quarter of the time, or its source where none was (a test by hand: `./dev machine -- bun test …`).
 */
export function programLine(name: MachineProgram): string[] {
  const built = process.env[PROGRAMS_VARIABLE];
  return built === undefined ? [process.execPath, join(ROOT, MACHINE_PROGRAMS[name])] : [join(built, name)];
}
