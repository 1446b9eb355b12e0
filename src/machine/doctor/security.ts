import type { Machine } from "../machine.ts";
import { bad, type Finding, ok, warn } from "./finding.ts";

const PROFILES = "/sys/kernel/security/apparmor/profiles";
/** Where libvirt keeps what one VM may open. */
const LIBVIRT_PROFILES = "/etc/apparmor.d/libvirt";
/** What all VMs may open; the second is the administrator's. */
const ABSTRACTIONS = ["/etc/apparmor.d/abstractions/libvirt-qemu", "/etc/apparmor.d/local/abstractions/libvirt-qemu"];

/** What may keep QEMU from its vhost-user sockets. @param pid a QEMU, @param sockets paths that it uses */
export async function checkSecurity(
  machine: Machine,
  pid: number | undefined,
  sockets: readonly string[],
): Promise<Finding[]> {
  return [await checkAppArmor(machine, pid, sockets), await checkSelinux(machine, pid)];
}

async function checkAppArmor(machine: Machine, pid: number | undefined, sockets: readonly string[]): Promise<Finding> {
  const check = "AppArmor";
  if ((await machine.text("/sys/module/apparmor/parameters/enabled")) !== "Y") return ok(check, "off");
  const enforced = (await machine.lines(PROFILES)).filter((line) => /^(libvirt|virt-aa|qemu).*\(enforce\)/.test(line));
  const current = pid === undefined ? undefined : await machine.text(`/proc/${pid}/attr/current`);
  const profile = /^(libvirt-\S+) \(enforce\)/.exec(current?.replaceAll("\0", "") ?? "")?.[1];
  if (profile !== undefined) {
    const refused = await Promise.all(sockets.map((path) => isUnknown(machine, profile, path)));
    const unknown = sockets.filter((_, index) => refused[index]);
    const fix = `add "${unknown[0]} rw," to ${ABSTRACTIONS[1]} and start the VM again`;
    return unknown.length === 0
      ? ok(check, `QEMU runs under ${profile}, enforced; its sockets are in it`)
      : bad(check, `QEMU runs under ${profile}, enforced, which does not name ${unknown.join(", ")}`, fix);
  }
  if (enforced.length === 0) return ok(check, "on; no profile of libvirt is enforced");
  const fix = `name the sockets ("/tmp/vhost-* rw,") in ${ABSTRACTIONS[1]} where they are given by qemu:commandline`;
  return warn(check, `on; enforced: ${enforced.slice(0, 4).join(", ")}`, fix);
}

/** No rule of the VM's profile or of what all have in common speaks of the path, or of a pattern for it. */
async function isUnknown(machine: Machine, profile: string, path: string): Promise<boolean> {
  const files = [`${LIBVIRT_PROFILES}/${profile}`, `${LIBVIRT_PROFILES}/${profile}.files`, ...ABSTRACTIONS];
  const lines = (await Promise.all(files.map((file) => machine.lines(file)))).flat();
  return !lines.some((line) => {
    const [, pattern, permissions = ""] = /^\s*(?:owner\s+)?"?(\/[^",\s]*)"?\s+([a-zA-Z]+),/.exec(line) ?? [];
    return pattern !== undefined && permissions.includes("w") && new Bun.Glob(pattern).match(path);
  });
}

async function checkSelinux(machine: Machine, pid: number | undefined): Promise<Finding> {
  const check = "SELinux";
  const enforcing = await machine.text("/sys/fs/selinux/enforce");
  if (enforcing === undefined) return ok(check, "off");
  if (enforcing !== "1") return ok(check, "permissive");
  const context =
    pid === undefined ? undefined : (await machine.text(`/proc/${pid}/attr/current`))?.replaceAll("\0", "");
  const fix =
    "if QEMU cannot listen or connect, `ausearch -m avc -ts recent` names what was refused: give the sockets a directory " +
    "with a type that svirt_t may use (semanage fcontext, restorecon)";
  return warn(check, `enforcing${context === undefined ? "" : `; QEMU runs as ${context}`}`, fix);
}
