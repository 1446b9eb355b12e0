import { stat } from "node:fs/promises";
import { dirname } from "node:path";
import { describeHolders } from "../holders.ts";
import type { Machine } from "../machine.ts";
import { bad, type Finding, ok, warn } from "./finding.ts";
import { listenersAt } from "./listeners.ts";

/** As whom QEMU is run by libvirt, on one distribution or another. */
const QEMU_USERS: readonly string[] = ["libvirt-qemu", "qemu"];
const DAEMON = "vfe-vhostd";
const OTHERS_WRITE = 0o002;

/** The vhost-user socket of a VF: there, somebody listens, and the other side may connect. */
export async function checkSocket(machine: Machine, path: string): Promise<Finding> {
  const check = `socket ${path}`;
  const file = await stat(machine.at(path)).catch(() => undefined);
  if (file === undefined) {
    const fix = `start the VM (-chardev socket,path=${path},server=on), or look whether it uses another path`;
    return warn(check, `not there${(await machine.exists(dirname(path))) ? "" : ", nor its directory"}`, fix);
  }
  if (!file.isSocket()) return bad(check, "it is no socket", "remove the file, or choose another path");
  const users = await readUsers(machine);
  const owner = `${users.get(file.uid) ?? file.uid}, mode ${(file.mode & 0o777).toString(8).padStart(4, "0")}`;
  const listeners = await listenersAt(machine, path);
  if (listeners === undefined) {
    const fix = "start the VM or the daemon that is to listen; the file is left over from one that has ended";
    return bad(check, `nobody listens (owner ${owner})`, fix);
  }
  const who = listeners.length === 0 ? "somebody" : describeHolders(listeners);
  const seen = `${who} listens (owner ${owner})`;
  const isOurs = listeners.some(({ name }) => DAEMON.startsWith(name) || name.startsWith(DAEMON));
  const front = [...users].find(([, name]) => QEMU_USERS.includes(name));
  if (isOurs && front !== undefined && file.uid !== front[0] && (file.mode & OTHERS_WRITE) === 0) {
    const fix = `chown ${front[1]} ${path}, or let QEMU listen (server=on) and the daemon connect`;
    return warn(check, `${seen}; QEMU as ${front[1]} may not connect`, fix);
  }
  return ok(check, seen);
}

/** Names by user id (passwd(5)). */
async function readUsers(machine: Machine): Promise<Map<number, string>> {
  const lines = (await machine.lines("/etc/passwd")).map((line) => line.split(":"));
  return new Map(lines.map(([name = "", , id]) => [Number(id), name]));
}
