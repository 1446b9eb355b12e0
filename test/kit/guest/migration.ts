import { Deadline } from "../../../src/base/deadline.ts";
import type { Qmp } from "./qmp.ts";

/** What `query-migrate` says that matters here. */
export interface MigrationStatus {
  readonly status: string;
  /** Why it failed, where QEMU says. */
  readonly error?: string;
  /** How often the dirty log was read: once before the first pass over memory, and at the end of each. */
  readonly syncs: number;
  /** Milliseconds from the stop of the machine, as QEMU counts it at the source. */
  readonly downtime: number;
  /** Milliseconds. */
  readonly total: number;
}

/** Bytes a second while memory is copied pass by pass. So slow that it does not come to an end by itself. */
const [BANDWIDTH, SLOW] = [64 * 2 ** 20, 32 * 2 ** 20];
/** The first, and two of what was written meanwhile. */
const PASSES = 3;
const FAST = 2 ** 32;
/** Milliseconds. What QEMU may stop the machine for: at first less than a pass takes, so that it makes another one. */
const [NO_DOWNTIME, ANY_DOWNTIME] = [1, 60_000];
const TIMEOUT = 90_000;
const LOOK_INTERVAL = 20;
const OVER = ["completed", "failed", "cancelled"];

/** One migration of a machine, as its source QEMU is asked to do it and says how it goes. */
export class Migration {
  private constructor(
    private readonly source: Qmp,
    private readonly destination: Qmp,
  ) {}

  /**
   * @param path of a unix socket to be made
   * @param speed "slow" where it is not to come to its end: of a migration that is disturbed
   */
  static async begin(source: Qmp, destination: Qmp, path: string, speed: "slow" | "usual"): Promise<Migration> {
    await destination.execute("migrate-incoming", { uri: `unix:${path}` });
    const migration = new Migration(source, destination);
    await migration.set(speed === "slow" ? SLOW : BANDWIDTH, NO_DOWNTIME);
    await source.execute("migrate", { uri: `unix:${path}` });
    return migration;
  }

  async status(): Promise<MigrationStatus> {
    // QEMU answers nothing while it waits for a back-end that is to stop its device.
    const answer = (await this.source.execute("query-migrate", {}, TIMEOUT)) as {
      readonly status?: string;
      readonly "error-desc"?: string;
      readonly "total-time"?: number;
      readonly downtime?: number;
      readonly ram?: { readonly "dirty-sync-count": number };
    };
    const error = answer["error-desc"];
    return {
      status: answer.status ?? "none",
      ...(error === undefined ? {} : { error }),
      syncs: answer.ram?.["dirty-sync-count"] ?? 0,
      downtime: answer.downtime ?? 0,
      total: answer["total-time"] ?? 0,
    };
  }

  /** Waits until memory was gone over so often. @throws Error where the migration ends before */
  async passed(passes = PASSES): Promise<MigrationStatus> {
    return await this.poll(`${passes} passes`, (now) => {
      if (now.syncs > passes) return true;
      if (OVER.includes(now.status))
        throw new Error(`the migration has ${describe(now)} after ${now.syncs - 1} passes`);
      return false;
    });
  }

  /** Lets the machine be stopped, and waits for the end, whatever it is. */
  async end(): Promise<MigrationStatus> {
    await this.hurry();
    return await this.over();
  }

  /** Lets the machine be stopped. */
  async hurry(): Promise<void> {
    await this.set(FAST, ANY_DOWNTIME);
  }

  /** Waits for the end, whatever it is. */
  async over(): Promise<MigrationStatus> {
    return await this.poll("the end of the migration", ({ status }) => OVER.includes(status));
  }

  /** As `end`. @throws Error where the machine does not run at the destination then */
  async complete(): Promise<MigrationStatus> {
    const ended = await this.end();
    if (ended.status !== "completed") throw new Error(`the migration has ${describe(ended)}`);
    await Deadline.after(TIMEOUT, "the machine at the destination").poll(async () => {
      const { status } = (await this.destination.execute("query-status")) as { readonly status: string };
      return (status !== "inmigrate" && status !== "finish-migrate") || undefined;
    }, LOOK_INTERVAL);
    return ended;
  }

  async cancel(): Promise<MigrationStatus> {
    await this.source.execute("migrate_cancel");
    return await this.over();
  }

  private async set(bandwidth: number, downtime: number): Promise<void> {
    await this.source.execute("migrate-set-parameters", { "max-bandwidth": bandwidth, "downtime-limit": downtime });
  }

  private async poll(what: string, done: (status: MigrationStatus) => boolean): Promise<MigrationStatus> {
    return await Deadline.after(TIMEOUT, what).poll(async () => {
      const now = await this.status();
      return done(now) ? now : undefined;
    }, LOOK_INTERVAL);
  }
}

function describe({ status, error }: MigrationStatus): string {
  return error === undefined ? status : `${status}: ${error}`;
}
