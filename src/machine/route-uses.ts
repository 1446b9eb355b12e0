import type { Machine } from "./machine.ts";

const INTERFACES = "/sys/class/net";
/** A route that refuses (linux/route.h, RTF_REJECT). */
const REJECT = 0x200;
const ANY_V4 = "00000000";
const ANY_V6 = "0".repeat(32);

/** Default routes that lead through the network interfaces of a function. @param directory of the function, resolved */
export async function routeUses(machine: Machine, directory: string): Promise<string[]> {
  const own = await machine.linksBelow(INTERFACES, directory);
  if (own.length === 0) return [];
  const uses: string[] = [];
  for (const [family, name] of await defaultRoutes(machine)) {
    const beneath = await interfacesBeneath(machine, name);
    for (const each of own.filter((candidate) => beneath.has(candidate))) {
      uses.push(`${each} carries the default route (${family}${each === name ? "" : ` through ${name}`})`);
    }
  }
  return uses;
}

/** Of the main table: family and interface. */
async function defaultRoutes(machine: Machine): Promise<["IPv4" | "IPv6", string][]> {
  const v4 = (await machine.lines("/proc/net/route")).flatMap((line) => {
    const [name = "", destination, , flags = "", , , , mask] = line.split(/\s+/);
    const counts = destination === ANY_V4 && mask === ANY_V4 && (Number.parseInt(flags, 16) & REJECT) === 0;
    return counts ? [["IPv4", name] as ["IPv4", string]] : [];
  });
  const v6 = (await machine.lines("/proc/net/ipv6_route")).flatMap((line) => {
    const [destination, length, , , , , , , flags = "", name = ""] = line.trim().split(/\s+/);
    const counts = destination === ANY_V6 && length === "00" && (Number.parseInt(flags, 16) & REJECT) === 0;
    return counts ? [["IPv6", name] as ["IPv6", string]] : [];
  });
  return [...v4, ...v6];
}

/** The interface and what it is made of: members of a bridge or bond, what a VLAN is on. */
async function interfacesBeneath(machine: Machine, top: string): Promise<Set<string>> {
  const all = await machine.names(INTERFACES);
  const masters = new Map(
    await Promise.all(all.map(async (name) => [name, await machine.linkName(`${INTERFACES}/${name}/master`)] as const)),
  );
  const seen = new Set([top]);
  // A set is walked through what is added meanwhile too.
  for (const name of seen) {
    for (const entry of await machine.names(`${INTERFACES}/${name}`)) {
      if (entry.startsWith("lower_")) seen.add(entry.slice("lower_".length));
    }
    for (const [member, master] of masters) if (master === name) seen.add(member);
  }
  return seen;
}
