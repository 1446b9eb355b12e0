import { type Holder, holdersOf } from "../holders.ts";
import type { Machine } from "../machine.ts";

/** It accepts connections (__SO_ACCEPTCON, linux/net.h; the column Flags of /proc/net/unix). */
const ACCEPTS = 0x10000;

/** Who listens at the socket file; undefined where nobody does. No holders: somebody who cannot be seen from here. */
export async function listenersAt(machine: Machine, path: string): Promise<readonly Holder[] | undefined> {
  const all = (await machine.lines("/proc/net/unix")).flatMap((line) => {
    const [, flags = "", inode, at] = /^\S+: \S+ \S+ (\S+) \S+ \S+\s+(\d+) (.*)$/.exec(line) ?? [];
    return inode === undefined ? [] : [{ inode, at, listens: (Number.parseInt(flags, 16) & ACCEPTS) !== 0 }];
  });
  // A name that is no path may have lines of its own in it: whoever forges one shows a socket twice.
  const isForged = ({ inode }: { readonly inode: string }) => all.filter((other) => other.inode === inode).length > 1;
  const inodes = all
    .filter((socket) => socket.listens && socket.at === path && !isForged(socket))
    .map(({ inode }) => `socket:[${inode}]`);
  return inodes.length === 0 ? undefined : await holdersOf(machine, new Set(inodes));
}
