import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { copyFile, mkdtemp, rm, truncate, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { VERSION } from "../../src/version.ts";
import { buildDebianPackage, DEBIAN_PACKAGE } from "../../tools/package/debian-package.ts";
import { installPrograms } from "../../tools/package.ts";
import { Debian } from "../kit/clean-debian/debian.ts";
import { findDebian } from "../kit/clean-debian/image.ts";

/** The Debian package in a Debian that has never had it: installed while there is no systemd, booted, upgraded, purged. */

const DAEMON = "vfe-vhostd.service";
const KEEPER = "vfe-vhostd-ha.service";
const SOFTVF = "vfe-softvf.service";
const PF = "0000:5a:00.0";
const VF = "0000:5a:00.1";
const TIMEOUT = 60_000;

// Inside.
const PACKAGE = "/root/package.deb";
const DISK = "/var/disk0.img";
const SOCKET = "/tmp/vhost.sock";

/** From 0 to 100, as `systemd-analyze security` rates what a unit may do. The units say why it is not less. */
const EXPOSURE_MAX = { [KEEPER]: 20, [DAEMON]: 40, [SOFTVF]: 35 };

const archive = await findDebian().catch(() => undefined);
const SKIP =
  process.getuid?.() !== 0
    ? " [skip: only root can install a package]"
    : archive === undefined
      ? " [skip: no clean Debian was made, ./dev setup says why]"
      : "";

/** One after the other: each goes on where the one before has ended. */
const step = (name: string, body: () => Promise<void>) => test(`${name}${SKIP}`, body, TIMEOUT);

describe.skipIf(SKIP !== "")("the Debian package", () => {
  let debian: Debian;

  beforeAll(async () => {
    const work = await mkdtemp(join(tmpdir(), "package-"));
    try {
      debian = await Debian.unpack(archive!);
      await installPrograms(join(work, "programs"), new Date().toISOString());
      await copyFile(await buildDebianPackage(join(work, "programs"), work), join(debian.root, PACKAGE));
    } finally {
      await rm(work, { recursive: true });
    }
  }, 2 * TIMEOUT);

  afterAll(async () => {
    await debian[Symbol.asyncDispose]();
  }, TIMEOUT);

  const states = async (what: "is-active" | "is-enabled") =>
    (await debian.try("systemctl", what, DAEMON, KEEPER, SOFTVF)).text.trim().split("\n");
  const pid = (unit: string) => debian.run("systemctl", "show", "--property=MainPID", "--value", unit);
  const pids = async () => ({ daemon: await pid(DAEMON), keeper: await pid(KEEPER), softvf: await pid(SOFTVF) });
  const another = (than: string) => expect.not.stringMatching(`^(0|${than})$`);
  const cli = (...words: readonly string[]) => debian.run("vfe-vhost-cli", ...words);

  /** The daemon has the VF that was added by command, and the keeper what the next daemon needs. */
  const expectVf = async () => {
    await Deadline.after(TIMEOUT, "a daemon whose keeper has everything").poll(async () => {
      const { text } = await debian.try("vfe-vhost-cli", "call", "stats");
      return /"protected": ?true/.test(text) || undefined;
    }, 50);
    expect(await cli("vf", "-l", PF)).toContain(VF);
  };

  step("installs where nothing runs", async () => {
    await debian.run("dpkg", "--install", PACKAGE);
    for (const program of ["vfe-vhostd", "vfe-vhostd-ha", "vfe-softvf"]) {
      expect(await debian.run(program, "--version")).toBe(VERSION);
    }
    expect(await cli("--help")).toContain("usage: vfe-vhost-cli");
    expect(await states("is-enabled")).toEqual(["enabled", "enabled", "disabled"]);
  });

  step("daemon and keeper run after a boot", async () => {
    await debian.boot();
    expect(await states("is-active")).toEqual(["active", "active", "inactive"]);
    expect(await cli("version")).toContain(VERSION);
  });

  step("VFs of vfe-softvf are served, at sockets in /tmp too", async () => {
    await writeFile(join(debian.root, DISK), "");
    await truncate(join(debian.root, DISK), 2 ** 20);
    const settings = `[[pf]]\naddress = "${PF}"\nclass = "blk"\ndisk = "${DISK}"\n`;
    await writeFile(join(debian.root, "etc/vfe-softvf.toml"), settings);
    await debian.run("systemctl", "start", SOFTVF);
    await cli("mgmtpf", "-a", PF);
    await cli("vf", "-a", VF, "--server", "-v", SOCKET);
    await debian.run("test", "-S", SOCKET);
    // The native module is not copied there, from where it would not load if programs are forbidden.
    expect(await debian.run("find", "/tmp", "-name", "*.node")).toBe("");
  });

  step("neither of daemon and keeper takes the other along, and a VF stays", async () => {
    const first = await pids();
    await debian.run("systemctl", "restart", KEEPER);
    const second = await pids();
    expect(second).toEqual({ ...first, keeper: another(first.keeper) });
    await expectVf();
    await debian.run("systemctl", "restart", DAEMON);
    const third = await pids();
    expect(third).toEqual({ ...second, daemon: another(second.daemon) });
    await expectVf();
    await debian.run("systemctl", "kill", "--signal=KILL", DAEMON);
    await Deadline.after(TIMEOUT, "the next daemon").poll(async () => {
      const next = await pid(DAEMON);
      return (next !== third.daemon && (await states("is-active"))[0] === "active") || undefined;
    }, 50);
    expect(await pids()).toEqual({ ...third, daemon: another(third.daemon) });
    await debian.run("test", "-S", "/run/vfe-vhostd/ha/keeper.sock");
    await expectVf();
  });

  step("an upgrade restarts the daemon alone, with its settings; the journal knows priorities", async () => {
    const settings = 'log-level = "debug"';
    await writeFile(join(debian.root, "etc/vfe-vhostd.toml"), settings);
    const before = await pids();
    await debian.run("dpkg", "--install", PACKAGE);
    expect(await pids()).toEqual({ ...before, daemon: another(before.daemon) });
    await expectVf();
    expect(await debian.run("cat", "/etc/vfe-vhostd.toml")).toBe(settings);
    const journal = ["journalctl", "--unit", DAEMON, "--output=json", "--output-fields=PRIORITY,MESSAGE"];
    const lines = (await debian.run(...journal)).split("\n");
    const entries = lines.map((line) => JSON.parse(line) as { readonly PRIORITY: string; readonly MESSAGE: string });
    expect(entries.some(({ PRIORITY }) => PRIORITY === "7")).toBe(true);
    expect(entries.filter(({ MESSAGE }) => /^<\d>/.test(MESSAGE))).toEqual([]);
  });

  step("systemd finds nothing wrong with the units", async () => {
    const units = Object.keys(EXPOSURE_MAX).map((name) => `/usr/lib/systemd/system/${name}`);
    expect(await debian.run("systemd-analyze", "verify", "--man=no", ...units)).toBe("");
    for (const [unit, limit] of Object.entries(EXPOSURE_MAX)) {
      await debian.run("systemd-analyze", "security", "--offline=yes", `--threshold=${limit}`, "--no-pager", unit);
    }
  });

  step("nothing is left behind when it is purged", async () => {
    await debian.run("dpkg", "--purge", DEBIAN_PACKAGE);
    expect(await debian.run("find", "/", "/run", "-xdev", "-name", "*vfe-*")).toBe("");
    expect((await debian.try("sh", "-c", "grep -l vfe- /proc/[0-9]*/comm")).text).toBe("");
  });
});
