import { Deadline } from "../../../src/base/deadline.ts";
import type { Guest } from "./guest.ts";

/** Verified I/O in the background of a guest (initramfs/verify-load): several workers, each on 16 MiB of its own. */
export class Load {
  private constructor(
    private readonly guest: Guest,
    private readonly workers: number,
  ) {}

  /** @param start MiB of the disk behind which the workers write */
  static async start(guest: Guest, start: number, workers: number): Promise<Load> {
    await guest.run(`rm -f /tmp/load.*; dd if=/dev/urandom of=/tmp/load.pattern bs=64k count=40 2> /dev/null
      for i in $(seq 0 ${workers - 1}); do verify-load /dev/vda ${start} $i > /tmp/load.$i.log 2>&1 & done`);
    const load = new Load(guest, workers);
    await load.progress();
    return load;
  }

  /** Waits until every worker has done another round, begun and ended from now on. @throws Error when one found a difference */
  async progress(timeout = 30_000): Promise<void> {
    const before = await this.rounds();
    await Deadline.after(timeout, "another round of every worker").poll(async () => {
      const now = await this.rounds();
      return now.every((count, worker) => count >= (before[worker] ?? 0) + 2) || undefined;
    }, 20);
  }

  /** Ends the workers. @returns rounds done, all verified @throws Error when one found a difference */
  async stop(): Promise<number> {
    await this.guest.run(`touch /tmp/load.stop; while pgrep -f "verify-load /dev" > /dev/null; do usleep 50000; done`);
    return (await this.rounds()).reduce((sum, count) => sum + count, 0);
  }

  private async rounds(): Promise<number[]> {
    const each = `cat /tmp/load.$i.rounds 2> /dev/null || echo 0`;
    const text = await this.guest.run(`cat /tmp/load.*.failed 2> /dev/null && exit 1
      for i in $(seq 0 ${this.workers - 1}); do ${each}; done`);
    return text.split("\n").map(Number);
  }
}
