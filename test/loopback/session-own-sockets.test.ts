import { expect, test } from "bun:test";
import { rmSync, symlinkSync } from "node:fs";
import { join } from "node:path";
import { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { HaLab } from "../kit/ha-lab.ts";
import { Machine, startDisk, writeAndVerify } from "./session-machine.ts";

/** A VF whose VMM's user makes the path of its socket lead to sockets of the daemon itself. */

const LED_ASTRAY = 0;
const OTHER = 1;
/** Milliseconds in which the daemon has tried to connect many times. */
const LONG_ENOUGH = 1500;

test("is served to none of them, and takes no other VF from its VMM", async () => {
  await using machine = await Machine.start({ vfs: 2, queues: 1 });
  const path = machine.socket(LED_ASTRAY);
  const isConnected = async () => {
    const info = await machine.call("vf.info", { device: machine.address(LED_ASTRAY) });
    return (info as { connected: boolean }).connected;
  };
  await machine.addVf(LED_ASTRAY, "client");
  symlinkSync(join(machine.directory, "run/rpc.sock"), path);
  await machine.daemon.line(new RegExp(`at ${path} listens no VMM but process ${machine.daemon.pid}`), LONG_ENOUGH);
  expect(await isConnected()).toBe(false);

  await machine.addVf(OTHER, "server");
  rmSync(path);
  symlinkSync(machine.socket(OTHER), path);
  await Bun.sleep(LONG_ENOUGH);
  expect(await isConnected()).toBe(false);
  using frontend = VhostUserFrontend.connect(machine.socket(OTHER));
  await startDisk(frontend, 1);
  await writeAndVerify(frontend.queues[0]!, 8);
});

test("is served to no other VF whose socket an earlier daemon has made either", async () => {
  await using lab = await HaLab.create({ vfs: 2 });
  await lab.startDaemon();
  await lab.addPf();
  const path = lab.socket("server.sock");
  await lab.call("vf.add", { device: lab.vfAt(OTHER), socket: path, mode: "server" });
  await lab.addVf(LED_ASTRAY);
  await lab.replaceDaemon();
  await lab.takenUp();
  symlinkSync(path, lab.socket(`vf${LED_ASTRAY}.sock`));
  await lab.daemon.line(new RegExp(`listens no VMM but process ${lab.daemon.pid}`), 20_000);
  expect(await lab.vf(OTHER)).toMatchObject({ connected: false, reason: null });
}, 60_000);
