import { mkdtemp, rm, truncate, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";

const PROGRAM = join(import.meta.dir, "../../bin/vfe-softvf.ts");

/** A temporary directory with images. */
export async function workspace(...images: readonly string[]) {
  const directory = await mkdtemp(join(tmpdir(), "softvf-"));
  for (const image of images) {
    await writeFile(join(directory, image), "");
    await truncate(join(directory, image), 1 << 20);
  }
  return {
    path: (name: string) => join(directory, name),
    [Symbol.asyncDispose]: () => rm(directory, { recursive: true, force: true }),
  };
}

/** The program, ready. Disposal ends it by SIGTERM. */
export function serve(...args: readonly string[]) {
  return serveBy([], ...args);
}

/** The same, started by another command. */
export async function serveBy(command: readonly string[], ...args: readonly string[]) {
  const child = Bun.spawn([...command, "bun", PROGRAM, ...args], { stdout: "pipe", stderr: "pipe" });
  const program = {
    line: "",
    log: "",
    stop: async () => {
      child.kill("SIGTERM");
      return await child.exited;
    },
    [Symbol.asyncDispose]: async () => void (await program.stop()),
  };
  const logged = (async () => {
    for await (const part of child.stderr) program.log += new TextDecoder().decode(part);
  })();
  const first = await child.stdout.getReader().read();
  program.line = new TextDecoder().decode(first.value);
  if (program.line.startsWith("ready ")) return program;
  await logged;
  throw new Error(program.log);
}

/** The program, until it ends. */
export async function run(...args: readonly string[]) {
  const child = Bun.spawn(["bun", PROGRAM, ...args], { stdout: "pipe", stderr: "pipe" });
  const [out, err, code] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
    child.exited,
  ]);
  return { out, err, code };
}
