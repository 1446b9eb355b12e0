import { expect, test } from "bun:test";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { queueCounts } from "../kit/guest/net-lab.ts";
import { type Migration, Stack } from "../kit/guest/stack.ts";
import { Testpmd } from "../kit/guest/testpmd.ts";

/** Movers and pairs of queues. */
const RUNS: readonly (readonly [Migration, number])[] = [
  ["vendor", 1],
  ["vendor", 2],
  ["none", 2],
];
/** Frames that have gone through each queue before the counts are compared. */
const FRAMES = 1000;

interface Counts {
  /** What the VF took from its driver to send. */
  readonly sent: number;
  /** What it gave to its driver. */
  readonly received: number;
  readonly bad: number;
}

async function countsOf(stack: Stack, vf: string): Promise<Counts> {
  const counts = { sent: 0, received: 0, bad: 0 };
  for (const { queue, received, completed, bad } of await queueCounts({ stack, vf })) {
    counts.bad += bad;
    if (queue % 2 === 1) counts.sent += received;
    else counts.received += completed;
  }
  return counts;
}

/** DPDK goes on before its queues are in use; a frame that is sent then is lost, as on any network. */
async function allEnabled({ daemon }: Stack, vf: string, queues: number): Promise<void> {
  const all = Array.from({ length: queues }, (_, queue) => queue).join(" ");
  const running = `running with ${queues} of ${queues} queues, features`;
  await daemon.line(new RegExp(`vf ${vf}: (${running}|queues ${all} are enabled)`), 10_000);
}

for (const [migration, pairs] of RUNS) {
  const kind = migration === "vendor" ? "managed" : "unmanaged";
  test(`testpmd forwards between two ${kind} VFs of ${pairs} pairs on a wire, listening at one and connecting to the other`, async () => {
    const directory = await mkdtemp(join(tmpdir(), "pmd-"));
    await using resources = new AsyncDisposableStack();
    resources.defer(() => rm(directory, { recursive: true, force: true }));
    const options = { directory, deviceClass: "net", vfs: 2, queues: pairs, migration } as const;
    const stack = resources.use(await Stack.start({ ...options, softvf: ["--backend", "wire"] }));
    await stack.startDaemon();
    await stack.command("mgmtpf", "-a", stack.pf);
    const ports = [
      { vf: stack.vfAddress(0), socket: join(directory, "listens"), role: "listen", pairs },
      { vf: stack.vfAddress(1), socket: join(directory, "connects"), role: "connect", pairs },
    ] as const;
    for (const { vf, socket, role } of ports) {
      await stack.command("vf", "-a", vf, "-v", socket, ...(role === "connect" ? ["--server"] : []));
    }
    const queues = [`--rxq=${pairs}`, `--txq=${pairs}`];
    const testpmd = resources.use(await Testpmd.start(directory, ports, queues));

    for (const { vf } of ports) await allEnabled(stack, vf, 2 * pairs);
    testpmd.start();
    await Deadline.after(20_000, `${FRAMES} frames through every queue`).poll(async () => {
      const counts = await Promise.all(ports.map(({ vf }) => queueCounts({ stack, vf })));
      return counts.flat().every(({ completed }) => completed >= FRAMES) || undefined;
    }, 20);
    const seen = await testpmd.stop();

    for (const [index, { vf }] of ports.entries()) {
      const { sent, received } = seen[index]!;
      await Deadline.after(5_000, "the VF to take what was sent").poll(
        async () => (await countsOf(stack, vf)).sent === sent || undefined,
        20,
      );
      const counts = await countsOf(stack, vf);
      expect(counts.bad).toBe(0);
      // What came after testpmd's last look at its rings was counted by the VF alone.
      expect(received).toBeGreaterThan(0);
      expect(counts.received).toBeGreaterThanOrEqual(received);
      expect(counts.received).toBeLessThanOrEqual(seen[1 - index]!.sent);
    }
  }, 60_000);
}
