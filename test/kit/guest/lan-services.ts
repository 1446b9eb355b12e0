import { createHash } from "node:crypto";
import { mkdir, open, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { Deadline } from "../../../src/base/deadline.ts";
import type { NetworkNamespace } from "../network-namespace.ts";
import { Child } from "./child.ts";

const MIB = 2 ** 20;
/** Bytes of the file that guests fetch. */
export const FILE_SIZE = 256 * MIB;
const START_TIMEOUT = 10_000;
/** Milliseconds in which another holder of an address would object to its being leased; there is none. */
const ARP_WAIT = 20;

export interface DhcpRange {
  /** Of the interface that it serves. */
  readonly device: string;
  readonly first: string;
  readonly last: string;
}

/** Servers in a network namespace for the guests in front of its interfaces: busybox's httpd and udhcpd. */
export class LanServices implements AsyncDisposable {
  private readonly dhcp: Child[] = [];

  private constructor(
    private readonly namespace: NetworkNamespace,
    private readonly busybox: string,
    private readonly directory: string,
    private readonly web: Child,
    /** SHA-256 of what is at http://ADDRESS/file, FILE_SIZE random bytes. */
    readonly checksum: string,
  ) {}

  /** @param directory takes the files that are served, and logs */
  static async start(namespace: NetworkNamespace, busybox: string, directory: string): Promise<LanServices> {
    const root = join(directory, "www");
    await mkdir(root);
    const checksum = await writeRandomFile(join(root, "file"));
    const web = new Child([...namespace.prefix, busybox, "httpd", "-f", "-p", "80", "-h", root], {
      name: "the web server",
      log: join(directory, "httpd.log"),
    });
    return new LanServices(namespace, busybox, directory, web, checksum);
  }

  /** Leases the addresses of a range. @returns the server, whose log tells what it was asked */
  async serveDhcp({ device, first, last }: DhcpRange): Promise<Child> {
    const files = join(this.directory, `udhcpd-${device}`);
    const lines = [
      ...[`interface ${device}`, `start ${first}`, `end ${last}`, "option subnet 255.255.255.0", "option lease 600"],
      ...[`lease_file ${files}.leases`, `pidfile ${files}.pid`],
    ];
    await writeFile(`${files}.conf`, `${lines.join("\n")}\n`);
    await writeFile(`${files}.leases`, "");
    const server = new Child(
      [...this.namespace.prefix, this.busybox, "udhcpd", "-f", "-a", `${ARP_WAIT}`, `${files}.conf`],
      {
        name: `the DHCP server of ${device}`,
        log: `${files}.log`,
      },
    );
    this.dhcp.push(server);
    await server.line(/started/, START_TIMEOUT);
    return server;
  }

  /** SHA-256 of what a web server out there answers. @throws Error when it does not */
  async fetchChecksum(url: string, timeout = 60_000): Promise<string> {
    const child = Bun.spawn([...this.namespace.prefix, this.busybox, "wget", "-q", "-O", "-", url], {
      stdio: ["ignore", "pipe", "pipe"],
    });
    const sum = createHash("sha256");
    const read = async () => {
      for await (const chunk of child.stdout) sum.update(chunk);
      const [errors, code] = await Promise.all([child.stderr.text(), child.exited]);
      if (code !== 0) throw new Error(`wget ${url} ended with ${code}: ${errors.trim()}`);
      return sum.digest("hex");
    };
    try {
      return await Deadline.after(timeout, `the answer of ${url}`).race(read());
    } finally {
      child.kill("SIGKILL");
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const server of [this.web, ...this.dhcp]) await server[Symbol.asyncDispose]();
  }
}

/** @returns the checksum */
async function writeRandomFile(path: string): Promise<string> {
  await using file = await open(path, "w");
  const sum = createHash("sha256");
  const block = new Uint8Array(MIB);
  for (let place = 0; place < block.length; place += 65536)
    crypto.getRandomValues(block.subarray(place, place + 65536));
  const view = new DataView(block.buffer);
  for (let written = 0; written < FILE_SIZE; written += block.length) {
    // Blocks that came in another order, twice or not at all make another sum.
    view.setUint32(0, written, true);
    sum.update(block);
    await file.write(block);
  }
  return sum.digest("hex");
}
