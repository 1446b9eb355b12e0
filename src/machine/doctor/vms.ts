import type { Machine } from "../machine.ts";
import { bad, type Finding, ok } from "./finding.ts";
import { listenersAt } from "./listeners.ts";
import { parseQemuOptions } from "./qemu-options.ts";

/** A VF that the daemon serves, as far as its VM goes. */
export interface ServedVf {
  readonly vf: string;
  readonly socket: string;
  /** Empty where none was given. */
  readonly uuid: string;
}

/** What else a process says goes into no command that is to be typed. */
const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i;

/** VFs with one VM UUID share a view of memory: those of two VMs must never have the same. */
export async function checkVms(machine: Machine, vfs: readonly ServedVf[]): Promise<Finding[]> {
  const owners = new Map<string, Map<number, string>>();
  const findings: Finding[] = [];
  for (const { vf, socket, uuid } of vfs) {
    const [listener] = (await listenersAt(machine, socket)) ?? [];
    if (uuid === "" || listener === undefined) continue;
    const options = await optionsOf(machine, listener.pid);
    const own = options.find(({ name }) => name === "uuid")?.values.get("");
    if (own !== undefined && UUID.test(own) && own.toLowerCase() !== uuid.toLowerCase()) {
      const seen = `its VM UUID is ${uuid}, that of the VM at its socket ${own}`;
      findings.push(bad(vf, seen, `vfe-vhost-cli vf -r ${vf}, then vf -a ${vf} -v ${socket} -u ${own}`));
    }
    owners.set(uuid, (owners.get(uuid) ?? new Map()).set(listener.pid, vf));
  }
  for (const [uuid, processes] of owners) {
    if (processes.size < 2) continue;
    const seen = `${uuid} is given to VFs of ${processes.size} VMs: ${[...processes].map(([pid, vf]) => `${vf} (pid ${pid})`).join(", ")}`;
    findings.push(
      bad("VM UUIDs", seen, "give each VM its own with vf -a … -u; the daemon refuses the second one's memory"),
    );
  }
  return findings.length > 0 || owners.size === 0 ? findings : [ok("VM UUIDs", `${owners.size}, each of one VM`)];
}

async function optionsOf(machine: Machine, pid: number) {
  const words = (await machine.bytes(`/proc/${pid}/cmdline`))?.toString("utf8").split("\0") ?? [];
  return parseQemuOptions(words.slice(1));
}
