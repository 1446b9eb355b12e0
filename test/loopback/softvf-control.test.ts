import { expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { mkdir, truncate } from "node:fs/promises";
import { join } from "node:path";
import { run, serve, workspace } from "./softvf-process.ts";

const PF = ["--pf", "0000:5a:00.0", "--class", "blk"];
const VF = "0000:5a:00.1";

test("an image that several VFs share is not resized under them", async () => {
  await using space = await workspace("disk");
  const place = ["--runtime-dir", space.path("run")];
  await using _ = await serve(...PF, "--vfs", "3", "--disk", space.path("disk"), ...place);
  for (const size of ["64K", "2M"]) {
    const { code, err } = await run("set", VF, `size=${size}`, ...place);
    expect(err).toContain(`the image ${space.path("disk")} cannot be resized, 2 other VFs use it`);
    expect(err).toContain("{vf}");
    expect(code).toBe(1);
  }
  expect(Bun.file(space.path("disk")).size).toBe(1 << 20);
}, 20_000);

test("several options are set together or not at all", async () => {
  await using space = await workspace("disk");
  const place = ["--runtime-dir", space.path("run")];
  await using _ = await serve(...PF, "--disk", space.path("disk"), ...place);
  const refusals = [
    [["size=2M", "slow=99999999"], "option slow is 99999999"],
    [["size=2M", "slow=5", "size=100"], "option size is 100, must be a multiple"],
    [["size=2M", "foo=1"], "class blk has no option foo; there are, to be set while the device runs: size, slow"],
    [["size=2M", "serial=x"], "option serial cannot be set while the device runs; these can: size, slow"],
    [["size=999999T"], "must be at most 8191T"],
  ] as const;
  for (const [settings, reason] of refusals) {
    const { code, err } = await run("set", VF, ...settings, ...place);
    expect(err).toContain(reason);
    expect(code).toBe(1);
    expect(Bun.file(space.path("disk")).size).toBe(1 << 20);
  }
}, 20_000);

test("who does not run, and how long is waited", async () => {
  await using space = await workspace();
  const place = ["--runtime-dir", space.path("run")];
  const missing = await run("list", "--timeout", "1.5", ...place);
  expect(missing).toMatchObject({ code: 1 });
  expect(missing.err).toContain("start vfe-softvf");
  expect(missing.err).not.toContain("daemon");
  const wrong = await run("list", "--timeout", "soon", ...place);
  expect(wrong).toMatchObject({ code: 2 });
  expect(wrong.err).toContain('--timeout is "soon", expected seconds');
}, 20_000);

test("images that do not fit are named", async () => {
  await using space = await workspace("odd", "empty");
  await truncate(space.path("odd"), 1000);
  await truncate(space.path("empty"), 0);
  const cases = [
    [["--disk", space.path("odd")], `disk image ${space.path("odd")} has 1000 bytes`],
    [["--disk", space.path("empty")], `disk image ${space.path("empty")} is empty`],
    [["--disk", space.path("odd"), "--block-size", "1000"], "option block-size is 1000"],
  ] as const;
  const place = ["--runtime-dir", space.path("run")];
  for (const [options, reason] of cases) {
    expect((await run(...PF, ...options, ...place)).err).toContain(reason);
    expect(existsSync(space.path("run"))).toBe(false);
  }
}, 20_000);

test("a runtime directory that was there stays; one that cannot be made is said", async () => {
  await using space = await workspace("disk");
  const disk = ["--disk", space.path("disk")];
  await mkdir(space.path("run"));
  await using program = await serve(...PF, ...disk, "--runtime-dir", space.path("run"));
  expect(await program.stop()).toBe(0);
  expect(existsSync(space.path("run"))).toBe(true);
  const { code, err } = await run(...PF, ...disk, "--runtime-dir", join(space.path("disk"), "run"));
  expect(err).toContain(`the runtime directory ${space.path("disk")}/run cannot be made: ENOTDIR`);
  expect(err).toContain("--runtime-dir");
  expect(code).toBe(1);
}, 20_000);
