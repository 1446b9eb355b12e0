import { expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { readdir, readFile, readlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { connectUnix } from "../../src/native/sys.ts";
import { parsePciAddress } from "../../src/pci/address.ts";
import { Bus } from "../../src/pci/bus.ts";
import { VfioUserFunction } from "../../src/pci/vfio-user/function.ts";
import { run, serve, serveBy, workspace } from "./softvf-process.ts";

const soon = () => Deadline.after(5000, "the program");

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
  expect([...(pf?.virtfns.values() ?? [])].map(String)).toEqual(["0000:5a:01.0", "0000:5a:01.1"]);
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
  expect(existsSync(runtime)).toBe(false);
}, 20_000);

test("a process without a descriptor left lets clients wait and goes on", async () => {
  await using space = await workspace("disk");
  const runtime = space.path("run");
  const limit = ["bash", "-c", 'ulimit -n 360; exec "$@"', "limited"];
  const args = ["--pf", "0000:5a:00.0", "--class", "blk", "--vfs", "20", "--disk", space.path("disk")];
  await using program = await serveBy(limit, ...args, "--runtime-dir", runtime);
  const devices = join(runtime, "devices");
  const vfs = (await readdir(devices)).filter((name) => name !== "0000:5a:00.0");
  {
    using clients = new DisposableStack();
    for (const vf of vfs) {
      for (let count = 0; count < 10; count++) {
        clients.use(connectUnix(join(devices, vf, "vfio-user.sock")));
        await Bun.sleep(1);
      }
    }
    await Deadline.after(5000, "the limit").poll(() => program.log.includes("no client is accepted") || undefined, 10);
  }
  const fn = await Deadline.after(5000, "a client").poll(
    () =>
      VfioUserFunction.connect(parsePciAddress(vfs[0]!), join(devices, vfs[0]!, "vfio-user.sock"), soon()).catch(
        () => undefined,
      ),
    50,
  );
  expect(await fn.config.read(0, 2)).toBe(0x1af4);
  await fn[Symbol.asyncDispose]();
  expect(await program.stop()).toBe(0);
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
disk = "a.img"
read-only = true
[[pf]]
address = "0001:ff:1f.6"
class = "blk"
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
