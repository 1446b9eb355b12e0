import { Deadline } from "../base/deadline.ts";
import { asError, VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { OperationQueue } from "../base/operation-queue.ts";
import { DirtyLogMapping, type MapForm } from "../native/dirty-log.ts";
import type { OwnedFd } from "../native/fd.ts";
import { memfd } from "../native/sys.ts";
import type { PciAddress } from "../pci/address.ts";
import { LOG_BYTE, LOG_PAGE } from "../virtio/dirty-log.ts";
import type { Deadlines } from "./deadlines.ts";
import type { VfParts } from "./vf-parts.ts";
import type { VfState } from "./vf-state.ts";

/** The VF whose writes are logged. */
export interface LoggingHost {
  readonly address: PciAddress;
  readonly parts: Pick<VfParts, "dataPath" | "mover">;
  readonly log: Logger;
  readonly deadlines: Deadlines;
  readonly operations: OperationQueue;
  readonly memory: { readonly end: number };
  state(): VfState;
  /** @throws VhostdError where the VF has failed */
  checkUsable(): void;
  /** The front-end has the pages marked that the VF writes. */
  frontEndLogs(): boolean;
}

/** What came of an operation. */
export type ManualLog = {
  /** How the device marks the pages. */
  readonly mode: string;
  /** At the end: that were written since the begin. */
  readonly pages?: number;
  /** At the end: from the begin on. */
  readonly milliseconds?: number;
};

/** `ended`: by somebody else, before who began it has asked for the outcome. */
type State =
  | { readonly kind: "off" }
  | {
      readonly kind: "on";
      readonly file: OwnedFd;
      readonly size: number;
      readonly mode: string;
      readonly began: number;
    }
  | { readonly kind: "ended"; readonly reason: string };

/**
 * A log of the pages that one VF writes, begun and ended by hand. It gives way to a log of the front-end's, and ends with
 * its session.
 */
export class ManualLogging {
  private state: State = { kind: "off" };

  constructor(
    private readonly vf: LoggingHost,
    private readonly now = () => performance.now(),
  ) {}

  get isOn(): boolean {
    return this.state.kind === "on";
  }

  /**
   * @param form that is preferred
   * @throws VhostdError busy where no guest runs the VF, or where its writes are logged already; notSupported where they cannot
   *   be; what the device says
   */
  start(form: MapForm | undefined): Promise<ManualLog> {
    const { vf } = this;
    return vf.operations.run(async () => {
      vf.checkUsable();
      this.checkStart();
      const { end } = vf.memory;
      const size = Math.ceil(end / LOG_BYTE / LOG_PAGE) * LOG_PAGE;
      using undo = new DisposableStack();
      const file = undo.use(memfd("dirty-log", size));
      const log = { fd: file.number, offset: 0, size };
      const own = form === undefined ? {} : { form };
      const mode = await vf.parts.dataPath.track({ log, end, own }, this.deadline("beginning"));
      undo.move();
      this.state = { kind: "on", file, size, mode: mode ?? "unknown", began: this.now() };
      vf.log.warn(`the pages that it writes are logged by hand (${mode})`);
      return { mode: this.state.mode };
    });
  }

  /** @throws VhostdError invalid where nothing is logged by hand; what the device says: nothing is logged any more then */
  stop(): Promise<ManualLog> {
    const { vf } = this;
    return vf.operations.run(async () => {
      const { state } = this;
      if (state.kind !== "on") throw this.notOn();
      this.state = { kind: "off" };
      using file = state.file;
      const milliseconds = Math.round((this.now() - state.began) * 1000) / 1000;
      await this.untrack();
      using mapping = new DirtyLogMapping(file.number, 0, state.size);
      const pages = await mapping.count();
      vf.log.info(`the log begun by hand has ended: ${pages} pages`);
      return { mode: state.mode, pages, milliseconds };
    });
  }

  /** Within an operation on the VF: nothing is logged by hand any more. Never rejects. */
  async giveWay(reason: string): Promise<void> {
    const { state } = this;
    if (state.kind !== "on") return;
    this.lost(reason);
    await this.untrack().catch((error) => this.vf.log.warn("a log by hand does not end", asError(error)));
  }

  /** The device does not mark all that it writes any more. */
  lost(reason: string): void {
    const { state } = this;
    if (state.kind !== "on") return;
    this.state = { kind: "ended", reason };
    state.file[Symbol.dispose]();
    this.vf.log.warn(`the log begun by hand has ended: ${reason}`);
  }

  /** Lets go of what is this process's. */
  abandon(): void {
    if (this.state.kind === "on") this.state.file[Symbol.dispose]();
    this.state = { kind: "off" };
  }

  /** What the device keeps to itself cannot be collected where it does not answer; then it is only told to end. */
  private async untrack(): Promise<void> {
    const { dataPath } = this.vf.parts;
    try {
      await dataPath.track(undefined, this.deadline("ending"));
    } catch (error) {
      await dataPath.track(undefined, this.deadline("ending"));
      throw error;
    }
  }

  private checkStart(): void {
    const { address, parts } = this.vf;
    const { capabilities } = parts.dataPath;
    if (!capabilities.dirtyTracking) {
      const why = capabilities.resumeAnywhere
        ? "its PF offers no way to, or none that worked when the VF was added"
        : parts.mover.unmanagedReason();
      throw new VhostdError("notSupported", `the pages that ${address} writes cannot be logged: ${why}`, {
        fix: '"call pf.list" shows which ways the PF has, the daemon\'s log why one did not work',
      });
    }
    const { name } = this.vf.state();
    if (name !== "running") {
      throw new VhostdError("busy", `${address} is ${name}: its writes are logged while a guest runs it`, {
        fix: "start its guest first, or let it go on",
      });
    }
    if (this.vf.frontEndLogs()) {
      throw new VhostdError("busy", `the front-end of ${address} logs its writes itself: its VM is being migrated`, {
        fix: "wait until the migration is over",
      });
    }
    if (this.isOn) {
      throw new VhostdError("busy", `the writes of ${address} are logged by hand already`, {
        fix: 'end that first, with "vf -d -o 5"',
      });
    }
  }

  private notOn(): VhostdError {
    const reason = this.state.kind === "ended" ? `not any more: ${this.state.reason}` : "nobody has begun it";
    this.state = { kind: "off" };
    return new VhostdError("invalid", `the writes of ${this.vf.address} are not logged by hand (${reason})`, {
      fix: 'begin with "vf -d -o 4"',
    });
  }

  private deadline(what: string): Deadline {
    return Deadline.after(this.vf.deadlines.start, `${what} to log what ${this.vf.address} writes`);
  }
}
