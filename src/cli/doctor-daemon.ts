import { asError, sentence } from "../base/errors.ts";
import { bad, type Finding, ok, warn } from "../machine/doctor/finding.ts";
import { checkVms, type ServedVf } from "../machine/doctor/vms.ts";
import type { Machine } from "../machine/machine.ts";
import { callDaemon, type DaemonPlace } from "./daemon-call.ts";

/** It may have a unit, and may have none. */
const START_FIX =
  "start vfe-vhostd as root (systemctl start vfe-vhostd where it has a unit); what it wrote last tells why it ended";

/** What the control interface answers, as far as it is looked at here. */
interface Answers {
  readonly version: Readonly<Record<string, unknown>>;
  readonly stats: { readonly protected?: boolean };
  readonly pfs: readonly { readonly pf: string; readonly admin_queue: string; readonly reason: string | null }[];
  readonly vfs: readonly {
    readonly vf: string;
    readonly state: string;
    readonly reason: string | null;
    readonly socket_file: string;
    readonly vm_uuid: string;
  }[];
}

/** The daemon answers; what of its PFs and VFs is wrong. */
export async function checkDaemon(machine: Machine, place: DaemonPlace): Promise<Finding[]> {
  let answers: Answers;
  try {
    answers = await ask(place);
  } catch (error) {
    return [bad("daemon", sentence(asError(error)), START_FIX)];
  }
  const version = String(answers.version["vfe-vhostd version"] ?? "unknown");
  const restart = answers.stats.protected === true ? "goes unnoticed" : "is seen by VMs: no keeper has what it has";
  const devices = `${answers.pfs.length} PFs, ${answers.vfs.length} VFs`;
  const findings = [ok("daemon", `${version}, ${devices}; a restart ${restart}`)];
  for (const { pf, admin_queue: queue, reason } of answers.pfs) {
    if (queue !== "dead") continue;
    const fix = "its VFs go on, but cannot be moved: remove and add it when they are free";
    findings.push(bad(`PF ${pf}`, `its admin queue is dead${reason === null ? "" : `: ${reason}`}`, fix));
  }
  for (const { vf, state, reason } of answers.vfs) {
    if (state === "failed") {
      findings.push(bad(`VF ${vf}`, reason ?? "it has failed", `vfe-vhost-cli vf -r ${vf}, then add it again`));
    } else if (reason !== null) findings.push(warn(`VF ${vf}`, reason, `vfe-vhost-cli vf -i ${vf}`));
  }
  return [...findings, ...(await checkVms(machine, answers.vfs.map(servedVf)))];
}

async function ask(place: DaemonPlace): Promise<Answers> {
  const version = await callDaemon(place, "version", {});
  const stats = (await callDaemon(place, "stats", {})) as Answers["stats"];
  const { pfs } = (await callDaemon(place, "pf.list", {})) as Pick<Answers, "pfs">;
  const { vfs } = (await callDaemon(place, "vf.list", {})) as Pick<Answers, "vfs">;
  return { version: version as Answers["version"], stats, pfs, vfs };
}

function servedVf({ vf, socket_file: socket, vm_uuid: uuid }: Answers["vfs"][number]): ServedVf {
  return { vf, socket, uuid };
}
