import { readlinkSync } from "node:fs";
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { Child } from "./guest/child.ts";

const START_TIMEOUT = 10_000;
const ROOT = process.getuid?.() === 0;

export interface TapOptions {
  /** With the length of the prefix: 10.0.0.1/24. None unless said. */
  readonly address?: string;
  /** Bytes; 1500 unless said. */
  readonly mtu?: number;
}

/**
 * A network namespace of one test's own: its interfaces and addresses are seen by nobody else and go with it. Without root
 * it is in a user namespace, in which the test may do the same.
 */
export class NetworkNamespace implements AsyncDisposable {
  private constructor(private readonly holder: Child) {}

  /** @param directory takes the log of the process that holds the namespace */
  static async create(directory: string): Promise<NetworkNamespace> {
    const holder = new Child(
      [
        "unshare",
        ...(ROOT ? ["--net"] : ["--net", "--map-root-user"]),
        "setpriv",
        "--pdeathsig",
        "KILL",
        "sleep",
        "inf",
      ],
      { name: "the network namespace", log: join(directory, "namespace.log") },
    );
    const namespace = new NetworkNamespace(holder);
    try {
      await Deadline.after(START_TIMEOUT, "a network namespace").poll(() => {
        if (!holder.running) throw new Error(`this machine has no network namespace for us: ${holder.tail()}`);
        const inside = namespaceOf(holder.pid);
        return (inside !== undefined && inside !== namespaceOf(process.pid)) || undefined;
      }, 5);
      await namespace.run("ip", "link", "set", "lo", "up");
    } catch (error) {
      await holder[Symbol.asyncDispose]();
      throw error;
    }
    return namespace;
  }

  /** Words in front of a command that is to run inside. */
  get prefix(): readonly string[] {
    const user = ROOT ? [] : ["--user", "--preserve-credentials"];
    return ["nsenter", "--target", `${this.holder.pid}`, "--net", ...user, "--"];
  }

  /** Runs a command inside. @returns its standard output @throws Error when it fails */
  async run(...command: readonly string[]): Promise<string> {
    const child = Bun.spawn([...this.prefix, ...command], {
      stdio: ["ignore", "pipe", "pipe"],
      env: { ...process.env, PATH: `${process.env["PATH"]}:/usr/sbin:/sbin` },
    });
    const [text, errors, code] = await Promise.all([child.stdout.text(), child.stderr.text(), child.exited]);
    if (code !== 0) throw new Error(`${command.join(" ")} ended with ${code}: ${errors.trim()}`);
    return text;
  }

  /** A TAP of several queues that a back-end inside can open; it stays when the back-end goes. */
  async addTap(name: string, { address, mtu = 1500 }: TapOptions = {}): Promise<void> {
    await this.run("ip", "tuntap", "add", "dev", name, "mode", "tap", "multi_queue", "vnet_hdr");
    await this.run("ip", "link", "set", "dev", name, "mtu", `${mtu}`, "up");
    if (address !== undefined) await this.run("ip", "address", "add", address, "dev", name);
  }

  async removeLink(name: string): Promise<void> {
    await this.run("ip", "link", "delete", "dev", name);
  }

  /** A counter of an interface, such as rx_packets. */
  async counter(name: string, counter: string): Promise<number> {
    const [link] = JSON.parse(await this.run("ip", "-json", "-statistics", "link", "show", "dev", name));
    const [direction = "", field = ""] = counter.split("_");
    return link.stats64[direction][field];
  }

  /** Ends whatever still runs inside, too: a server's child that waits for a guest that is gone keeps the namespace. */
  async [Symbol.asyncDispose](): Promise<void> {
    for (const pid of await processesIn(namespaceOf(this.holder.pid))) if (pid !== this.holder.pid) end(pid);
    await this.holder[Symbol.asyncDispose]();
  }
}

/** The link to the namespace: its identity. Undefined for a process that is gone, or is another user's. */
function namespaceOf(pid: number): string | undefined {
  try {
    return readlinkSync(`/proc/${pid}/ns/net`);
  } catch {
    return undefined;
  }
}

async function processesIn(namespace: string | undefined): Promise<number[]> {
  if (namespace === undefined) return [];
  const pids = (await readdir("/proc")).filter((entry) => /^\d+$/.test(entry)).map(Number);
  return pids.filter((pid) => namespaceOf(pid) === namespace);
}

function end(pid: number): void {
  try {
    process.kill(pid, "SIGKILL");
  } catch {
    // It ended by itself in between.
  }
}
