import { afterAll, beforeAll, expect, test } from "bun:test";
import { lstatSync, mkdtempSync, readdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { VERSION } from "../../../src/version.ts";
import { installPrograms } from "../../../tools/package.ts";
import { Child } from "../../kit/guest/child.ts";

/** The programs in the form that users install. */

let directory: string;
const programs = () => join(directory, "programs");
beforeAll(async () => {
  directory = mkdtempSync(join(tmpdir(), "programs-"));
  await installPrograms(programs(), "now");
}, 30_000);
afterAll(() => rmSync(directory, { recursive: true }));

async function run(name: string, ...words: readonly string[]): Promise<string> {
  const log = join(directory, `${name}.log`);
  await using child = new Child([join(programs(), name), ...words], { name, log });
  await child.exited;
  return child.log;
}

test("are one executable, which is the one by whose name it is called, and the keeper", async () => {
  const names = readdirSync(programs())
    .filter((name) => name.startsWith("vfe-"))
    .sort();
  const files = names.filter((name) => lstatSync(join(programs(), name)).isFile());
  expect([names, files]).toEqual([
    ["vfe-softvf", "vfe-vhost-cli", "vfe-vhostd", "vfe-vhostd-ha"],
    ["vfe-vhostd", "vfe-vhostd-ha"],
  ]);
  for (const name of names) expect(await run(name, "--help")).toContain(`usage: ${name} `);
  expect(await run("vfe-vhostd-ha", "--version")).toEndWith(`\n${VERSION}\n`);
});

test("load the native module beside them, and copy none", async () => {
  const log = join(directory, "keeper.log");
  const command = [join(programs(), "vfe-vhostd-ha"), "--runtime-dir", join(directory, "run")];
  const temporary = mkdtempSync(join(directory, "tmp-"));
  await using keeper = new Child(command, {
    name: "keeper",
    log,
    environment: { TMPDIR: temporary, BUN_TMPDIR: temporary },
  });
  await keeper.line(/^ready /m, 15_000);
  expect(await Bun.file(`/proc/${keeper.pid}/maps`).text()).toContain(join(programs(), "vhostd.node"));
  expect(readdirSync(temporary)).toEqual([]);
});
