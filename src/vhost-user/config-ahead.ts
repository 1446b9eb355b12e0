import type { SessionTarget } from "./target.ts";

/** Milliseconds after which what was read is read again: a VMM says all of a set-up at once. */
const AGE_MAX = 100;

/**
 * The configuration space that a function is started with. It is asked for as soon as a front-end begins to set up, because
 * its VM may stand still until the function runs.
 */
export class ConfigAhead {
  private asked: { readonly at: number; readonly config: Promise<Uint8Array | undefined> } | undefined;

  constructor(
    private readonly target: Pick<SessionTarget, "readConfig">,
    private readonly now = () => performance.now(),
  ) {}

  /** A start is to be expected. */
  ask(): void {
    if (this.fresh !== undefined) return;
    // What could not be read is read again, for who takes it.
    const config = this.target.readConfig().catch(() => undefined);
    this.asked = { at: this.now(), config };
  }

  /** It may be another from now on. */
  forget(): void {
    this.asked = undefined;
  }

  /** @throws VhostdError where the function cannot be read */
  async take(): Promise<Uint8Array> {
    const { fresh } = this;
    this.forget();
    return (await fresh) ?? (await this.target.readConfig());
  }

  private get fresh(): Promise<Uint8Array | undefined> | undefined {
    const { asked } = this;
    return asked !== undefined && this.now() - asked.at < AGE_MAX ? asked.config : undefined;
  }
}
