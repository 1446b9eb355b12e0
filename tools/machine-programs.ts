import { existsSync } from "node:fs";
import { mkdir, mkdtemp, readdir, rm } from "node:fs/promises";
import { join } from "node:path";
import { MACHINE_PROGRAMS } from "../test/kit/machine/programs.ts";
import { ROOT } from "./command.ts";
import { compilePrograms } from "./package.ts";

/** Not below /tmp, of which machines have their own. */
const FOLDER = join(ROOT, ".cache/programs");

/** The programs that tests in machines start, as executables: made anew for a run, never older than the sources. */
export class MachinePrograms implements AsyncDisposable {
  private constructor(readonly directory: string) {}

  /** @throws Failure when one does not compile */
  static async build(): Promise<MachinePrograms> {
    await mkdir(FOLDER, { recursive: true });
    await removeAbandoned();
    const programs = new MachinePrograms(await mkdtemp(join(FOLDER, `${process.pid}-`)));
    try {
      const sources = Object.entries(MACHINE_PROGRAMS).map(([name, source]) => [source, name] as const);
      await compilePrograms(programs.directory, sources, new Date().toISOString());
      return programs;
    } catch (error) {
      await programs[Symbol.asyncDispose]();
      throw error;
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await rm(this.directory, { recursive: true, force: true });
  }
}

/** Of runs that were killed: half a gigabyte each. */
async function removeAbandoned(): Promise<void> {
  const abandoned = (await readdir(FOLDER)).filter((name) => !existsSync(`/proc/${Number.parseInt(name, 10)}`));
  for (const name of abandoned) await rm(join(FOLDER, name), { recursive: true, force: true });
}
