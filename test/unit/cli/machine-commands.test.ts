import { expect, test } from "bun:test";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";

const CLI = join(import.meta.dir, "../../../bin/vfe-vhost-cli.ts");
/** No machine has it: the last domain that an address can name. */
const NOWHERE = "ffffffff:ff:1f.7";

function cli(...args: string[]): { code: number | null; out: string; err: string } {
  const { exitCode, stdout, stderr } = Bun.spawnSync([process.execPath, CLI, ...args]);
  return { code: exitCode, out: stdout.toString(), err: stderr.toString() };
}

test("what cannot be meant is a usage error", () => {
  for (const args of [
    ["bind"],
    ["unbind"],
    ["sriov", "5a:00.0"],
    ["sriov", "5a:00.0", "many"],
    ["doctor", "--qemu", "x"],
  ]) {
    expect(cli(...args).code).toBe(2);
  }
});

test("a function that this machine has not is refused by each command", () => {
  for (const args of [
    ["bind", NOWHERE],
    ["unbind", NOWHERE],
    ["sriov", NOWHERE, "1"],
  ]) {
    expect(cli(...args)).toMatchObject({ code: 1, out: "", err: expect.stringContaining(`no function ${NOWHERE}`) });
  }
});

test("every finding of the doctor has a level, what was seen, and what to do", async () => {
  const directory = await mkdtemp(join(tmpdir(), "doctor-"));
  try {
    const options = join(directory, "options");
    await Bun.write(options, "-m 512 -device vhost-user-blk-pci,chardev=c,packed=on");
    const common = ["--runtime-dir", directory, "--qemu-args", options, NOWHERE];
    const { code, out } = cli("doctor", "--json", ...common);
    expect(code).toBe(1);
    const { findings, bad } = JSON.parse(out) as { findings: Record<string, string>[]; bad: number };
    expect(findings.filter(({ level }) => level === "bad")).toHaveLength(bad);
    for (const { level, check, seen, fix } of findings) {
      expect([check, seen].every((text) => text !== undefined && text !== "")).toBe(true);
      expect((fix ?? "") === "").toBe(level === "ok");
    }
    const badChecks = findings.filter(({ level }) => level === "bad").map(({ check }) => check);
    for (const check of ["guest memory", "daemon", NOWHERE]) expect(badChecks).toContain(check);
    expect(cli("doctor", ...common).out).toContain("BAD   guest memory: it is private to QEMU");
    expect(cli("doctor", "--qemu-args", join(directory, "none")).err).toContain("cannot be read");
  } finally {
    await rm(directory, { recursive: true });
  }
});
