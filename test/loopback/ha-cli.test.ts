import { expect, test } from "bun:test";
import { join } from "node:path";
import { VERSION } from "../../src/version.ts";
import { HaLab, rewrite } from "../kit/ha-lab.ts";
import { SteppedGuest } from "../kit/ha-steps.ts";

/** What people see of a restart, and how they ask for one. */

const CLI = join(import.meta.dir, "../../bin/vfe-vhost-cli.ts");
const ANY_TIME = 20_000;

async function cli(lab: HaLab, ...args: string[]) {
  const child = Bun.spawn([process.execPath, CLI, "--runtime-dir", lab.runtimeDirectory, ...args], {
    stdout: "pipe",
    stderr: "pipe",
  });
  const [stdout, stderr, code] = await Promise.all([child.stdout.text(), child.stderr.text(), child.exited]);
  return { stdout, stderr, code, json: stdout.startsWith("{") ? JSON.parse(stdout) : undefined };
}

test("an upgrade: the next daemon goes on with everything, and its VMs notice nothing", async () => {
  await using lab = await HaLab.create({ queues: 2 });
  await lab.startDaemon();
  await lab.addPf();
  using guest = await SteppedGuest.start(lab);
  const { pid, protected: isProtected } = await lab.call<{ pid: number; protected: boolean }>("stats");
  expect({ pid, isProtected }).toEqual({ pid: lab.daemon.pid, isProtected: true });
  const version = (await cli(lab, "version")).json;
  expect(version).toMatchObject({ "vfe-vhostd-ha version": VERSION, errno: 0 });
  expect(version["vfe-vhostd-ha build time"]).toBe(version["vfe-vhostd build time"]);

  // Who supervises it.
  const first = lab.daemon;
  const next = first.exited.then((code) => {
    lab.spawnDaemon();
    return code;
  });
  const upgraded = await cli(lab, "upgrade");
  expect(upgraded).toMatchObject({ code: 0, stdout: `${VERSION} → ${VERSION}, 1 VFs\n`, stderr: "" });
  expect(await next).toBe(0);
  expect(await lab.call("stats")).toMatchObject({ pid: lab.daemon.pid, vfs: 1, sessions: 1, protected: true });
  expect(lab.daemon.pid).not.toBe(pid);
  await guest.isHeard();
  await guest.end();
  expect(guest.reconnects).toBe(0);
}, 60_000);

test("an upgrade that finds VFs which cannot go on says so", async () => {
  await using lab = await HaLab.create();
  await lab.startDaemon();
  await lab.addPf();
  await lab.addVf();
  void lab.daemon.exited.then(async () => {
    {
      using keeper = await lab.connectKeeper();
      await rewrite(keeper, `vf/${lab.vfAt(0)}`, ({ record, fds }) => ({ record: { ...record, rings: 7 }, fds }));
    }
    lab.spawnDaemon();
  });
  const upgraded = await cli(lab, "upgrade");
  expect(upgraded).toMatchObject({ code: 1, stdout: `${VERSION} → ${VERSION}, 0 VFs\n` });
  expect(upgraded.stderr).toContain("1 VFs could not be taken up: vfe-vhost-cli doctor");
  const { devices } = (await cli(lab, "vf", "-l", lab.pf)).json;
  expect(devices).toEqual([
    {
      ...{ vf: lab.vfAt(0), probed: false, vm_uuid: "", socket_file: lab.socket("vf0.sock") },
      reason: expect.stringMatching(/rings/),
    },
  ]);
  const info = await cli(lab, "vf", "-i", lab.vfAt(0));
  expect(info).toMatchObject({ code: 1 });
  expect(info.stdout + info.stderr).toContain("could not be taken up after a restart");
}, 60_000);

test("without a keeper an upgrade is refused, and says what to do", async () => {
  await using lab = await HaLab.create({ keeper: false });
  await lab.startDaemon();
  const refused = await cli(lab, "upgrade");
  expect(refused).toMatchObject({ code: 1, stdout: "" });
  expect(refused.stderr).toContain("cannot be replaced unnoticed: nobody keeps what it has");
  expect(refused.stderr).toContain("systemctl start vfe-vhostd-ha");
  expect(lab.daemon.running).toBe(true);
  expect((await cli(lab, "version")).json["vfe-vhostd-ha version"]).toBe("vfe-vhostd-ha is not connected");
  expect(await lab.call("stats")).toMatchObject({ pid: lab.daemon.pid, protected: false });
  await lab.daemon[Symbol.asyncDispose]();

  // Starting one would not help.
  await lab.startKeeper();
  await lab.startDaemon({ arguments: ["--ha", "off"] });
  const off = await cli(lab, "upgrade");
  expect(off.code).toBe(1);
  expect(off.stderr).toMatch(/started with ha = "off": configure another way/);
  expect(off.stderr).not.toContain("systemctl start");
}, 60_000);

test("an upgrade for which nobody starts the next daemon says so", async () => {
  await using lab = await HaLab.create();
  await lab.startDaemon();
  const { pid } = lab.daemon;
  const alone = await cli(lab, "upgrade", "--timeout", "3");
  expect(alone).toMatchObject({ code: 1, stdout: "" });
  expect(alone.stderr).toContain(`process ${pid} has ended, and no other daemon serves`);
  expect(alone.stderr).toContain("systemctl start vfe-vhostd");
}, 60_000);

test("the front-end that waits is served first, and its VF is in service when vf -i answers", async () => {
  await using lab = await HaLab.create({ queues: 2 });
  await lab.startDaemon();
  await lab.addPf();
  const guests: SteppedGuest[] = [];
  using _ = {
    [Symbol.dispose]() {
      for (const guest of guests) guest[Symbol.dispose]();
    },
  };
  for (let index = 0; index < 4; index++) guests.push(await SteppedGuest.start(lab, index));
  await lab.daemon.kill();
  const waits = guests[3]!.isHeard();
  lab.spawnDaemon();
  await lab.daemon.line(/^ready /m, ANY_TIME);
  const { json } = await cli(lab, "vf", "-i", lab.vfAt(2));
  expect(json.device).toMatchObject({ vf: lab.vfAt(2), probed: true, configured: true });
  await waits;
  await lab.takenUp();
  for (const guest of guests) {
    await guest.isHeard();
    await guest.end();
    expect(guest.reconnects).toBe(0);
  }
}, 60_000);
