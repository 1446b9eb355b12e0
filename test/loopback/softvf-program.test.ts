import { expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { mkdtemp, readdir, readFile, readlink, rm, truncate, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parsePciAddress } from "../../src/pci/address.ts";
import { Bus } from "../../src/pci/bus.ts";

const PROGRAM = join(import.meta.dir, "../../bin/vfe-softvf.ts");

/** A temporary directory with images. */
async function workspace(...images: readonly string[]) {
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
async function serve(...args: readonly string[]) {
  const child = Bun.spawn(["bun", PROGRAM, ...args], { stdout: "pipe", stderr: "pipe" });
  const first = await child.stdout.getReader().read();
  const line = new TextDecoder().decode(first.value);
  if (!line.startsWith("ready ")) throw new Error(await new Response(child.stderr).text());
  const stop = async () => {
    child.kill("SIGTERM");
    return await child.exited;
  };
  return { line, stop, [Symbol.asyncDispose]: async () => void (await stop()) };
}

async function run(...args: readonly string[]) {
  const child = Bun.spawn(["bun", PROGRAM, ...args], { stdout: "pipe", stderr: "pipe" });
  const [out, err, code] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
    child.exited,
  ]);
  return { out, err, code };
}

test("a PF and its VFs are published like sysfs, controlled, and gone after SIGTERM", async () => {
  await using space = await workspace("disk0", "disk1");
  const runtime = space.path("run");
  const disk = space.path("disk{vf}");
  const args = ["--pf", "0000:5a:00.7", "--class", "blk", "--vfs", "2", "--disk", disk, "--queues", "2"];
  await using program = await serve(...args, "--runtime-dir", runtime);
  expect(program.line).toBe(`ready ${runtime}\n`);

  const devices = join(runtime, "devices");
  expect((await readdir(devices)).sort()).toEqual(["0000:5a:00.7", "0000:5a:01.0", "0000:5a:01.1"]);
  const pf = await new Bus([devices]).find(parsePciAddress("5a:00.7"));
  expect(pf).toMatchObject({ vendor: 0x1af4, device: 0x1042, class: 0x010000, physfn: undefined });
  expect(pf?.virtfns.map(String)).toEqual(["0000:5a:01.0", "0000:5a:01.1"]);
  expect(await readFile(join(devices, "0000:5a:00.7", "sriov_numvfs"), "utf8")).toBe("2\n");
  expect(await readlink(join(devices, "0000:5a:01.1", "physfn"))).toBe("../0000:5a:00.7");

  expect((await run("list", "--runtime-dir", runtime)).out).toContain("0000:5a:01.1  vf  blk  free");
  expect((await run("stats", "--runtime-dir", runtime)).out.split("\n").filter(Boolean)).toHaveLength(4);
  expect(await run("set", "5a:01.0", "size=2M", "slow=5", "--runtime-dir", runtime)).toMatchObject({
    code: 0,
    err: "",
  });
  expect(Bun.file(space.path("disk0")).size).toBe(2 << 20);
  const refused = await run("set", "5a:01.0", "serial=x", "--runtime-dir", runtime);
  expect(refused).toMatchObject({ code: 1 });
  expect(refused.err).toContain("option serial cannot be set while the device runs; these can: size, slow");

  const second = await run(...args, "--runtime-dir", runtime);
  expect(second).toMatchObject({ code: 1 });
  expect(second.err).toContain("another process listens");
  expect(existsSync(join(devices, "0000:5a:01.0", "vfio-user.sock"))).toBe(true);

  expect(await program.stop()).toBe(0);
  expect(await readdir(runtime)).toEqual([]);
}, 20_000);

test("several PFs from a file; VF addresses run over buses", async () => {
  await using space = await workspace("a.img");
  const file = space.path("softvf.toml");
  const image = space.path("a.img");
  await writeFile(
    file,
    `runtime-dir = "run"
[[pf]]
address = "0000:01:00.0"
class = "blk"
vfs = 2
disk = "${image}"
read-only = true
[[pf]]
address = "0001:ff:1f.6"
class = "blk"
vfs = 1
disk = "${image}"
block-size = 4096
`,
  );
  await using _ = await serve("--config", file);
  const found = await readdir(space.path("run/devices"));
  expect(found.sort()).toEqual(["0000:01:00.0", "0000:01:00.1", "0000:01:00.2", "0001:ff:1f.6", "0001:ff:1f.7"]);
}, 20_000);

test("what cannot be served is said, with the fix", async () => {
  await using space = await workspace();
  const base = ["--pf", "0000:5a:00.0", "--class", "blk"];
  const cases = [
    [[...base, "--disk", space.path("none")], "create it (truncate -s 1G"],
    [[...base], "option disk is missing"],
    [[...base, "--disk", "x", "--ring-size", "100"], "option ring-size is 100"],
    [["--pf", "0000:5a:00.0", "--class", "tape"], 'no software device of class "tape"'],
    [["--pf", "5a", "--class", "blk", "--disk", "x"], "is not a PCI address"],
    [["--pf", "0000:ff:1f.7", "--class", "blk", "--disk", "x"], "beyond bus ff"],
  ] as const;
  const outcomes = await Promise.all(
    cases.map(([args], index) => run(...args, "--runtime-dir", space.path(`run${index}`))),
  );
  for (const [index, { code, err }] of outcomes.entries()) {
    expect(err).toContain(cases[index]![1]);
    expect(code).toBe(1);
  }
  expect((await run("--pf", "0000:5a:00.0")).code).toBe(2);
  expect((await run("--class", "blk", "--help")).out).toContain("--out-of-order");
  expect((await run("list", "--runtime-dir", space.path("run"))).code).toBe(1);
}, 20_000);
