import { Deadline } from "../../../src/base/deadline.ts";
import { DESCRIPTION_VARIABLE } from "../machine/description.ts";
import type { Guest } from "./guest.ts";

/** MiB of a disk that one worker writes to. */
const SHARE = 16;
/** Milliseconds. A look is a command in the guest, which takes time from the workers: seconds in one inside of a VM. */
const LOOK_INTERVAL = process.env[DESCRIPTION_VARIABLE] === undefined ? 200 : 2000;

/** Verified I/O in the background of a guest (initramfs/verify-load): several workers for each disk, each on its own part. */
export class Load {
  private constructor(
    private readonly guest: Guest,
    private readonly workers: readonly string[],
  ) {}

  /**
   * @param disks as the guest calls them; no other load may be running on one of them
   * @param start MiB of each disk behind which the workers write
   * @param workers for each disk
   * @param timeout milliseconds for their first round
   * @param blocks of 64 KiB in a round, at most 16
   */
  static async start(
    guest: Guest,
    disks: readonly string[],
    start: number,
    workers: number,
    timeout?: number,
    blocks = 16,
  ): Promise<Load> {
    await guest.run(`dd if=/dev/urandom of=/tmp/load.next bs=64k count=$((24 + ${blocks})) 2> /dev/null; mv /tmp/load.next /tmp/load.pattern
      for disk in ${disks.join(" ")}; do
        rm -f /tmp/load.$disk.*
        for i in $(seq 0 ${workers - 1}); do
          verify-load /dev/$disk $((${start} + i * ${SHARE})) $disk.$i ${blocks} > /tmp/load.$disk.$i.log 2>&1 &
          echo $! > /tmp/load.$disk.$i.pid
        done
      done`);
    const names = disks.flatMap((disk) => Array.from({ length: workers }, (_, worker) => `${disk}.${worker}`));
    const load = new Load(guest, names);
    await load.progress(timeout);
    return load;
  }

  /** Waits until every worker has done another round, begun and ended from now on. @throws Error when one found a difference */
  async progress(timeout = 60_000): Promise<void> {
    const before = await this.rounds();
    await Deadline.after(timeout, "another round of every worker").poll(async () => {
      const now = await this.rounds();
      return now.every((count, worker) => count >= (before[worker] ?? 0) + 2) || undefined;
    }, LOOK_INTERVAL);
  }

  /** Ends the workers. @returns rounds done, all verified @throws Error when one found a difference */
  async stop(): Promise<number> {
    await this.guest.run(`for name in ${this.workers.join(" ")}; do
        touch /tmp/load.$name.stop; while kill -0 $(cat /tmp/load.$name.pid) 2> /dev/null; do usleep 50000; done
      done`);
    return (await this.rounds()).reduce((sum, count) => sum + count, 0);
  }

  /** What each worker has done and verified so far. @throws Error when one found a difference */
  async rounds(): Promise<number[]> {
    const text = await this.guest.run(`cat /tmp/load.*.failed 2> /dev/null && exit 1
      for name in ${this.workers.join(" ")}; do cat /tmp/load.$name.rounds 2> /dev/null || echo 0; done`);
    return text.split("\n").map(Number);
  }
}
