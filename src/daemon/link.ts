import Type, { type Static } from "typebox";
import { asError, sentence } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import { parseStored } from "../base/stored.ts";
import type { DeviceClass } from "../plugin.ts";
import { configValues } from "../virtio/config-space.ts";

/** A function that was reset sends no interrupts: while its link is down it is asked. Milliseconds. */
const LOOK_INTERVAL = 1_000;

const Schema = Type.Object({
  up: Type.Boolean(),
  /** The guest of the front-end that is connected has run with the link up. */
  shown: Type.Boolean(),
  /** Process id of the front-end that is not served before the link is up. */
  away: Type.Union([Type.Integer(), Type.Null()]),
});
/** Plain data. */
export type LinkRecord = Static<typeof Schema>;

/** What the link was before: read from the configuration space just now, or the record of an earlier process. */
export type LinkBefore = { readonly config: Uint8Array } | { readonly record: unknown };

/** The session of the front-end whose guest runs the function. */
export interface LinkGuest {
  /** Process id of the VMM. */
  readonly peer: number;
  /** It is told of changes of the configuration space, so its guest sees the link by itself. */
  readonly hearsOfChanges: boolean;
  close(reason: string): void;
}

export interface LinkOptions {
  readonly deviceClass: Pick<DeviceClass, "linkUp" | "configSpace">;
  /** That the function offers. */
  readonly deviceFeatures: bigint;
  readonly log: Logger;
  /** Reads the configuration space, and has it `seen`. */
  readonly readConfig: () => Promise<unknown>;
  /** undefined while no guest runs the function. */
  readonly guest: () => LinkGuest | undefined;
  /** A guest goes on after a new connection. */
  readonly canReconnect: () => boolean;
  /** The link, or what is done about it, has changed. */
  readonly onChange: () => void;
  /** `snapshot` has something else to say, which must outlive the process. */
  readonly onRecord: () => void;
  /** Between two looks while it is down, milliseconds; 1 s. */
  readonly interval?: number;
}

/**
 * Whether a VF reaches the world outside. A VMM that is not told of configuration changes takes its guest's link down
 * when the connection ends. So where a guest that can go on later has run with the link up and runs while it is down, its
 * front-end is hung up on and turned away until the link is up, no matter whether the guest ran or was stopped when the
 * link went down.
 */
export class Link implements Disposable {
  private up: boolean;
  private shown = false;
  /** A look has found reason to hang up: the next one decides. */
  private doubted = false;
  private away: number | undefined;
  private timer: ReturnType<typeof setTimeout> | undefined;
  private closed = false;
  /** A device that tells of changes without end is read one time after the other. */
  private looking = false;
  private lookAgain = false;

  /** @throws VhostdError invalid where a record is malformed */
  constructor(
    private readonly options: LinkOptions,
    before: LinkBefore,
  ) {
    if ("config" in before) {
      this.up = this.isUp(before.config);
    } else {
      const { up, shown, away }: LinkRecord = parseStored(Schema, before.record, "the record of a VF's link");
      this.up = up;
      this.shown = shown;
      this.away = away ?? undefined;
    }
    if (!this.up) this.lookLater();
  }

  /** What is wrong with the link and who knows; undefined while it is up. */
  get trouble(): string | undefined {
    if (this.up) return undefined;
    if (this.away !== undefined) {
      return `the link is down: its guest (process ${this.away}) is turned away until it is up`;
    }
    const guest = this.options.guest();
    if (guest === undefined) return "the link is down";
    return `the link is down: its guest ${guest.hearsOfChanges ? "sees it" : "does not see it"}`;
  }

  /** Whether a front-end of this process is served now. */
  welcomes(pid: number): boolean {
    // A process of another pid namespace has no number here.
    return pid === 0 || pid !== this.away;
  }

  /** Looks at the link, which may have changed. Never rejects. */
  async look(): Promise<void> {
    if (this.closed || this.options.deviceClass.linkUp === undefined) return;
    this.lookAgain = true;
    if (this.looking) return;
    this.looking = true;
    while (this.lookAgain && !this.closed) {
      this.lookAgain = false;
      await this.lookOnce();
    }
    this.looking = false;
  }

  /** A guest has begun to run: what the link is now counts, not what it was before. Never rejects. */
  async begin(): Promise<void> {
    if (!this.closed && this.options.deviceClass.linkUp !== undefined) await this.lookOnce();
  }

  /** The configuration space was read. */
  seen(config: Uint8Array): void {
    if (this.closed || this.options.deviceClass.linkUp === undefined) return;
    const up = this.isUp(config);
    const guest = this.options.guest();
    if (!up) this.lookLater();
    else if (guest !== undefined) this.show();
    const deceived = !up && guest !== undefined && this.isDeceived(guest);
    const hangUp = deceived && this.doubted;
    this.doubted = deceived && !hangUp;
    // It may be up again: a front-end is not hung up on before one more look.
    if (this.doubted) return void this.look();
    if (up === this.up && !hangUp) return;
    this.up = up;
    if (up) this.wentUp();
    else this.wentDown(hangUp ? guest : undefined);
    this.options.onChange();
    this.options.onRecord();
  }

  /** The front-end is gone; the next one may bring another guest. */
  forget(): void {
    this.shown = false;
    this.doubted = false;
  }

  snapshot(): LinkRecord {
    return { up: this.up, shown: this.shown, away: this.away ?? null };
  }

  [Symbol.dispose](): void {
    this.closed = true;
    clearTimeout(this.timer);
  }

  private async lookOnce(): Promise<void> {
    try {
      await this.options.readConfig();
    } catch (error) {
      this.options.log.debug(`the link could not be looked at: ${sentence(asError(error))}`);
      if (!this.up) this.lookLater();
    }
  }

  private isUp(config: Uint8Array): boolean {
    const { deviceClass, deviceFeatures } = this.options;
    return deviceClass.linkUp?.(configValues(deviceClass.configSpace, config), deviceFeatures) ?? true;
  }

  private wentUp(): void {
    clearTimeout(this.timer);
    this.away = undefined;
    this.options.log.info("the link is up");
  }

  /** @param guest whose front-end is hung up on */
  private wentDown(guest: LinkGuest | undefined): void {
    if (guest !== undefined) {
      this.away = guest.peer;
      this.forget();
      guest.close("the link is down, which this front-end sees by nothing else");
    }
    this.options.log.warn(this.trouble ?? "");
  }

  private show(): void {
    if (this.shown) return;
    this.shown = true;
    this.options.onRecord();
  }

  /** It takes the link for up, and hanging up would tell it otherwise. */
  private isDeceived(guest: LinkGuest): boolean {
    return this.shown && !guest.hearsOfChanges && this.options.canReconnect();
  }

  private lookLater(): void {
    clearTimeout(this.timer);
    if (!this.closed) this.timer = setTimeout(() => void this.look(), this.options.interval ?? LOOK_INTERVAL);
  }
}
