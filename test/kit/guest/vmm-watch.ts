import { readFileSync } from "node:fs";
import { Deadline } from "../../../src/base/deadline.ts";
import type { Guest } from "./guest.ts";
import type { MigrationHost } from "./migration-host.ts";

/** Milliseconds. */
const CONNECT_TIMEOUT = 30_000;
/** State of a socket in /proc/net/unix. */
const CONNECTED = "03";

/** What a VMM notices of its back-ends: connections that are not those of before, and what it complains of. */
export class VmmWatch {
  private constructor(
    private readonly host: MigrationHost,
    private readonly guest: Guest,
    private connections: string,
    private log: string,
  ) {}

  /** Waits until there is one connection for each of the VM's devices. */
  static async begin(host: MigrationHost, guest: Guest): Promise<VmmWatch> {
    // Until it answers it sets up its devices.
    await guest.vm.qmp.execute("query-status");
    const connections = await Deadline.after(CONNECT_TIMEOUT, "a connection of each device").poll(
      () => connectionsOf(host),
      20,
    );
    return new VmmWatch(host, guest, connections, guest.vm.qemu.log);
  }

  /** @throws Error where the VMM has noticed something */
  unnoticed(): void {
    const { host, guest, connections, log } = this;
    const now = connectionsOf(host);
    const written = guest.vm.qemu.log.slice(log.length);
    if (now === connections && written === "") return;
    throw new Error(`noticed: sockets ${connections} are ${now} now; the VMM wrote "${written}"\n${host.stack.story}`);
  }

  /** Waits until each device has another connection than before. That is what is to stay from now on. */
  async anew(): Promise<void> {
    const { host, guest, connections } = this;
    const before = connections.split(" ");
    this.connections = await Deadline.after(CONNECT_TIMEOUT, "a new connection of each device").poll(() => {
      const now = connectionsOf(host);
      return now?.split(" ").every((connection) => !before.includes(connection)) ? now : undefined;
    }, 20);
    this.log = guest.vm.qemu.log;
  }
}

/**
 * The connected sockets at the paths of a VM's devices, which are those of the side that listens, whichever process has them.
 * @returns an inode for each path, which no later connection has; undefined where one has none, or several
 */
function connectionsOf({ sockets }: MigrationHost): string | undefined {
  const lines = readFileSync("/proc/net/unix", "utf8").split("\n");
  const found = [...sockets.values()].flatMap((path) =>
    lines.flatMap((line) => {
      const [, , , , , state, inode = "", at] = line.split(/\s+/);
      return at === path && state === CONNECTED ? [inode] : [];
    }),
  );
  return found.length === sockets.size ? found.join(" ") : undefined;
}
