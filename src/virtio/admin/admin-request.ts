import type { Deadline } from "../../base/deadline.ts";
import { VhostdError } from "../../base/errors.ts";
import { type AdminQueue, NeverPosted } from "./admin-queue.ts";
import { ADMIN_DO_NOT_RETRY, ADMIN_HEADER, ADMIN_STATUS_CODE, AdminStatus, vdevName } from "./vendor.ts";

/** Milliseconds between two tries of a command that may be tried again, and how many there are. */
const RETRY_INTERVAL = 1_000;
const RETRIES_MAX = 120;

type FailureCode = "quiesceFailed" | "freezeFailed" | "stateSave" | "io";

/** A command that the device refused for good. */
export class AdminRefusal extends VhostdError {
  constructor(
    code: FailureCode,
    message: string,
    /** The status code, without the bit that says whether to try again. */
    readonly status: number,
    /** Another try makes no sense. */
    readonly final: boolean,
  ) {
    super(code, message, { fix: "look at the log of the PF's server or firmware" });
    this.name = "AdminRefusal";
  }
}

/** A command of one of the vendor's classes. */
export interface AdminRequest {
  /** Numbers of the class, and of the command in it. */
  readonly class: number;
  readonly number: number;
  /** The command's name, for the error. */
  readonly name: string;
  readonly vdevId: number;
  /** It may change the VF whenever the device comes to it, be it long after anybody waited. */
  readonly alters: boolean;
  readonly data?: Uint8Array;
  readonly payload?: Uint8Array;
  readonly resultLength?: number;
  /** Of the error where it fails. */
  readonly code?: FailureCode;
  /** `once`: a refusal is an answer. `ahead`: so it is, and nobody needs it yet. */
  readonly tries?: "once" | "ahead";
}

/** Sends commands over an admin queue, again where the device allows it and there is time. */
export class AdminChannel {
  /** @param retryInterval milliseconds between two tries */
  constructor(
    readonly queue: AdminQueue,
    private readonly retryInterval = RETRY_INTERVAL,
  ) {}

  /**
   * @returns the result of a command that ended well, as long as was asked for
   * @throws AdminRefusal; VhostdError with the request's code where it was not answered; adminQueue, busy, cancelled
   */
  async ask(request: AdminRequest, deadline: Deadline): Promise<Uint8Array> {
    const { vdevId, alters, data = new Uint8Array(0), payload, resultLength = 0, code = "io" } = request;
    const header = ADMIN_HEADER.encode({ class: request.class, command: request.number });
    const ahead = request.tries === "ahead";
    const buffers = {
      vdevId,
      alters,
      header,
      data,
      resultLength,
      ahead,
      ...(payload === undefined ? {} : { payload }),
    };
    const what = `${request.name} of ${vdevName(vdevId)}`;
    const triesMax = request.tries === undefined ? RETRIES_MAX : 0;
    let refusal: AdminRefusal | undefined;
    try {
      for (let tries = 0; ; tries++) {
        const { status, result } = await this.queue.submit(buffers, deadline);
        const number = status & ADMIN_STATUS_CODE;
        if (number === AdminStatus.ok) return result;
        const final = (status & ADMIN_DO_NOT_RETRY) !== 0;
        const why = final || tries === 0 ? "" : `, also after ${tries} more tries`;
        refusal = new AdminRefusal(
          code,
          `${this.queue.address} refused ${what}: ${describeCode(number)}${why}`,
          number,
          final,
        );
        if (final || tries >= triesMax || deadline.remaining <= this.retryInterval) throw refusal;
        await Bun.sleep(this.retryInterval);
      }
    } catch (cause) {
      if (!(cause instanceof VhostdError && cause.code === "timedOut")) throw cause;
      if (refusal !== undefined) throw refusal;
      const why = cause instanceof NeverPosted ? "was never asked for" : "did not answer";
      throw new VhostdError(code, `${this.queue.address} ${why} ${what}: ${cause.message}`, { cause });
    }
  }
}

function describeCode(code: number): string {
  const name = Object.entries(AdminStatus).find(([, value]) => value === code)?.[0];
  return name === undefined ? `code ${code}` : `${name} (code ${code})`;
}
