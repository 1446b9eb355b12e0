import { describe, expect, test } from "bun:test";
import { eventfd, signalEventfd } from "../../src/native/sys.ts";
import { Request } from "../../src/vhost-user/messages.ts";
import { usedIndex } from "../../src/virtio/split-ring.ts";
import { Dice } from "../kit/dice.ts";
import { DriverQueue } from "../kit/driver-queue.ts";
import { DriverRing } from "../kit/driver-ring.ts";
import { u64, type VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { LonelyGuest, renewEventfds } from "../kit/frontend/hang-up.ts";
import { SEED } from "../kit/fuzz.ts";
import { MOVERS } from "../kit/movers.ts";
import { RegistryLab } from "../kit/registry-lab.ts";
import { type BackgroundIo, VerifiedDisk } from "../kit/verified-disk.ts";

/** A VF is started and stopped in every way that there is, in random order, while its guest does verified I/O. */

const QUEUES = 4;
const DEPTH = 4;
/** Blocks of the disk that one queue has for itself. */
const RANGE = 256;
const CYCLES = { registers: 100, vendor: 200 } as const;

const STEPS = {
  registers: ["stopAndGoOn", "renewFds", "resetByStatus", "die"],
  vendor: ["stopAndGoOn", "renewFds", "resetByStatus", "die", "hangUp", "addRing"],
} as const;
type Step = (typeof STEPS)["vendor"][number];

/** A guest that does I/O on all its queues all the time, and the VMM around it. */
class BusyGuest {
  private frontend: VhostUserFrontend;
  private loads: BackgroundIo[] = [];
  /** What is on the disk outlives the guest. */
  private readonly disks = Array.from({ length: QUEUES }, (_, index) => new VerifiedDisk(index * RANGE, RANGE));

  constructor(
    private readonly lab: RegistryLab,
    private readonly dice: Dice,
    private readonly mover: (typeof MOVERS)[number]["mover"],
  ) {
    this.frontend = lab.dial();
  }

  get verified(): number {
    return this.disks.reduce((sum, { verified }) => sum + verified, 0);
  }

  async boot(): Promise<void> {
    await this.lab.run(this.frontend, 1 + this.dice.roll(QUEUES), this.firstIndex());
    this.load();
  }

  /** Every queue gets on. */
  async progress(): Promise<void> {
    await Promise.all(this.loads.map((io) => io.progress(DEPTH)));
  }

  /** Stops in order, and says that nothing was lost. */
  async shutDown(): Promise<void> {
    await Promise.all(this.loads.map((io) => io.stop()));
    for (const { driver } of this.frontend.queues) expect(driver.returned).toBe(driver.submitted);
    for (const { index, driver } of this.frontend.queues) await this.disks[index]!.verifyAll(driver);
    this.frontend[Symbol.dispose]();
  }

  async stopAndGoOn(): Promise<void> {
    const { frontend } = this;
    // Without its PF a function can only serve until nothing is left.
    if (this.mover === "registers") for (const io of this.loads) io.pause();
    const bases = await frontend.stop({ order: this.dice.pick(["old", "new"]) });
    expect(bases).toEqual(frontend.queues.map(({ driver: { ring } }) => usedIndex(frontend.memory, ring)));
    await frontend.resumeQueues(bases);
    for (const io of this.loads) io.resume();
  }

  async hangUp(): Promise<void> {
    using guest = LonelyGuest.hangUp(this.frontend);
    this.frontend = this.lab.dial();
    await guest.meet(this.frontend);
  }

  /** The guest's driver gives up its rings and begins with new ones. */
  async resetByStatus(): Promise<void> {
    const { frontend } = this;
    await frontend.setStatus(0);
    await frontend.setFeatures();
    const ended = this.loads;
    await frontend.startQueues(1 + this.dice.roll(QUEUES), { firstIndex: this.firstIndex() });
    await Promise.all(ended.map((io) => io.abandon()));
    this.load();
  }

  async die(): Promise<void> {
    this.frontend[Symbol.dispose]();
    await Promise.all(this.loads.map((io) => io.abandon()));
    this.frontend = this.lab.dial();
    await this.boot();
  }

  /** One more ring, where there is room, while the others are in use. */
  async addRing(): Promise<void> {
    const { frontend } = this;
    const { memory, features, queues } = frontend;
    const index = queues.length;
    if (index === QUEUES) return;
    const base = memory.regions.at(-1)!.file.gpa + index * DriverRing.span(128);
    const firstIndex = this.firstIndex();
    const ring = new DriverRing({ memory, base, size: 128, features, firstIndex });
    const kick = eventfd();
    const driver = new DriverQueue(ring, () => signalEventfd(kick.number));
    queues.push({ index, kick, driver });
    this.loads.push(this.disks[index]!.runOn(driver, DEPTH));
    await frontend.setupQueue({ index, kick, driver }, firstIndex);
  }

  async renewFds(): Promise<void> {
    const { frontend } = this;
    for (const [at, queue] of frontend.queues.entries()) {
      const renewed = renewEventfds(queue, (kick) => signalEventfd(kick.number));
      frontend.queues[at] = renewed;
      const { index, kick, driver } = renewed;
      const messages = [
        [Request.SET_VRING_KICK, kick.number],
        [Request.SET_VRING_CALL, driver.call.number],
      ] as const;
      for (const [request, fd] of this.dice.roll(2) === 0 ? messages : messages.toReversed()) {
        await frontend.command(request, u64(BigInt(index)), [fd]);
      }
    }
  }

  private firstIndex(): number {
    return this.mover === "vendor" ? this.dice.pick([0, 0x10000 - 1 - this.dice.roll(64), this.dice.roll(0x10000)]) : 0;
  }

  private load(): void {
    this.loads = this.frontend.queues.map(({ index, driver }) => this.disks[index]!.runOn(driver, DEPTH));
  }
}

describe.each(MOVERS)("moved by $mover", ({ mover, migration }) => {
  test("random starts and stops under load", async () => {
    console.log(`seed ${SEED}`);
    await using lab = await RegistryLab.create({ migration, softvf: ["--queues", `${QUEUES}`] });
    await lab.registry.addPf(lab.pf);
    await lab.serve();
    const dice = new Dice(SEED);
    const guest = new BusyGuest(lab, dice, mover);
    await guest.boot();
    const done: Step[] = [];
    try {
      for (let cycle = 0; cycle < CYCLES[mover]; cycle++) {
        if (cycle % 8 === 0) {
          await lab.set(lab.pf, { freeze: dice.pick(["drain", "list", "hold"]) });
          await lab.set(lab.vf, { slow: dice.pick([0, 0, 1, 4]), "out-of-order": dice.pick([true, false]) });
        }
        const step: Step = dice.pick(STEPS[mover]);
        done.push(step);
        await guest[step]();
        await guest.progress();
        await lab.running();
        expect(lab.registry.vfInfo(lab.vf)).toMatchObject({ reason: null, mover });
      }
      await guest.shutDown();
    } catch (error) {
      const said = lab.warnings.slice(-3).join("; ");
      throw new Error(`cycle ${done.length}: ${done.slice(-5).join(", ")}; seed ${SEED}; log: ${said}`, {
        cause: error,
      });
    }
    expect(guest.verified).toBeGreaterThan(CYCLES[mover] * DEPTH);
  }, 60_000);
});
