import { mkdirSync, renameSync } from "node:fs";
import { join } from "node:path";

const ROOT = join(import.meta.dir, "../..");
const NATIVE = join(ROOT, "native");
const OUTPUT = join(ROOT, ".cache/bench-native");

/**
 * Builds a program of test/bench/native with the system's compiler.
 * @param objects of native/build that it is linked with, without ".o"
 * @returns its path
 */
export async function buildProgram(name: string, objects: readonly string[] = []): Promise<string> {
  mkdirSync(OUTPUT, { recursive: true });
  const program = join(OUTPUT, name);
  const linked = objects.map((object) => join(NATIVE, "build", `${object}.o`));
  const source = join(import.meta.dir, "native", `${name}.cc`);
  const flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-D_GNU_SOURCE", `-I${NATIVE}`];
  await output([process.env.CXX ?? "g++", ...flags, "-o", `${program}.new`, source, ...linked]);
  renameSync(`${program}.new`, program);
  return program;
}

/** The CPU that a benchmark has to itself and its programs: the last of those that this process may use. */
export async function benchCpu(): Promise<string> {
  const status = await Bun.file("/proc/self/status").text();
  const last = status.match(/^Cpus_allowed_list:.*?(\d+)$/m)?.[1];
  if (last === undefined) throw new Error("/proc/self/status does not say which CPUs may be used");
  return last;
}

/** Runs a program. @param fds its descriptors from 3 on @returns its standard output. @throws Error with what it wrote */
export async function output(command: readonly string[], fds: readonly number[] = []): Promise<string> {
  const child = Bun.spawn([...command], { stdio: ["ignore", "pipe", "pipe", ...fds] });
  const [text, errors, code] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
    child.exited,
  ]);
  if (code !== 0) throw new Error(`${command.join(" ")} ended with ${code}: ${errors}`);
  return text;
}
