import { join } from "node:path";
import { Deadline } from "../../../src/base/deadline.ts";
import { Child } from "./child.ts";

const START_TIMEOUT = 30_000;
const STOP_TIMEOUT = 10_000;
/** MiB. */
const MEMORY = 256;
const STATISTICS = /-+ Forward statistics for port (\d+) +-+\n +RX-packets: (\d+)[^\n]*\n +TX-packets: (\d+)/g;

export interface TestpmdPort {
  /** vhost-user socket. */
  readonly socket: string;
  /** Who listens: DPDK, or the back-end. */
  readonly role: "listen" | "connect";
  /** Of queues; 1 unless said. */
  readonly pairs?: number;
}

/** Frames that testpmd has received and sent at a port. */
export interface PortCounts {
  readonly received: number;
  readonly sent: number;
}

/** DPDK's test program on virtio-user ports: a front-end without a VMM. It needs neither huge pages nor devices. */
export class Testpmd implements AsyncDisposable {
  private constructor(private readonly child: Child) {}

  /** Returns when all ports are up. @param directory takes its log; its name makes DPDK's own files distinct */
  static async start(directory: string, ports: readonly TestpmdPort[], more: readonly string[] = []): Promise<Testpmd> {
    const devices = ports.map(({ socket, role, pairs = 1 }, index) => {
      const server = role === "listen" ? ",server=1" : "";
      return `--vdev=net_virtio_user${index},path=${socket},queues=${pairs},mac=02:00:00:00:01:0${index}${server}`;
    });
    const child = new Child(
      [
        // Its output is a file, which it would write to in large pieces.
        ...[
          "stdbuf",
          "-oL",
          "dpdk-testpmd",
          "--no-huge",
          "-m",
          `${MEMORY}`,
          "--no-pci",
          "--no-telemetry",
          "--log-level=error",
        ],
        ...["--file-prefix", `testpmd-${process.pid}-${directory.split("/").at(-1)}`, ...devices],
        ...["--", "-i", "--total-num-mbufs=8192", ...more],
      ],
      {
        name: "dpdk-testpmd",
        log: join(directory, "testpmd.log"),
        interactive: true,
        environment: { XDG_RUNTIME_DIR: directory, RUNTIME_DIRECTORY: directory },
      },
    );
    try {
      await child.line(/testpmd> /, START_TIMEOUT);
    } catch (error) {
      await child[Symbol.asyncDispose]();
      throw error;
    }
    return new Testpmd(child);
  }

  /** All that it has said. */
  get log(): string {
    return this.child.log;
  }

  /** Begins to forward, with a burst of its own frames at each port. */
  start(): void {
    this.child.type("start tx_first");
  }

  /** Ends forwarding. @returns what was counted since the start, by port */
  async stop(): Promise<PortCounts[]> {
    const before = this.log.length;
    this.child.type("stop");
    await Deadline.after(STOP_TIMEOUT, "testpmd's last word").poll(
      () => /^Done\.$/m.test(this.log.slice(before)) || undefined,
      10,
    );
    const counts: PortCounts[] = [];
    for (const [, port, received, sent] of this.log.slice(before).matchAll(STATISTICS)) {
      counts[Number(port)] = { received: Number(received), sent: Number(sent) };
    }
    return counts;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.child.running) this.child.type("quit");
    await this.child[Symbol.asyncDispose]();
  }
}
