import { Deadline } from "../base/deadline.ts";
import { asError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import { NotifySocket } from "./notify-socket.ts";
import type { ServiceEnvironment } from "./service-environment.ts";

/** Milliseconds for a message to be taken. */
const SEND_TIMEOUT = 10_000;

/**
 * Tells systemd how this process is (sd_notify(3)), where it wants to know. Whether it can be told is of no matter to the
 * process: failures are logged.
 *
 * Where the service has a watchdog, its signs of life come from a timer of the event loop, so they end with the loop.
 */
export class Notify implements Disposable {
  private readonly socket: NotifySocket | undefined;
  private readonly timer: ReturnType<typeof setInterval> | undefined;

  constructor(
    { notifySocket, watchdog }: ServiceEnvironment,
    private readonly log: Logger,
  ) {
    if (notifySocket === undefined) return;
    try {
      this.socket = new NotifySocket(notifySocket);
    } catch (error) {
      log.warn("systemd cannot be notified", asError(error));
      return;
    }
    if (watchdog === undefined) return;
    this.timer = setInterval(() => this.tell("WATCHDOG=1"), Math.max(1, watchdog / 2));
    this.timer.unref();
  }

  /** It serves. @param status for people, one line */
  ready(status?: string): void {
    this.tell("READY=1", ...(status === undefined ? [] : [statusField(status)]));
  }

  /** It is about to end. */
  stopping(): void {
    this.tell("STOPPING=1");
  }

  /** What it does, for people (`systemctl status`). @param text one line */
  status(text: string): void {
    this.tell(statusField(text));
  }

  /** Systemd hears no more of it. */
  [Symbol.dispose](): void {
    clearInterval(this.timer);
    this.socket?.[Symbol.dispose]();
  }

  private tell(...fields: string[]): void {
    const deadline = Deadline.after(SEND_TIMEOUT, `"${fields[0]}" to systemd`);
    this.socket?.send(fields, [], deadline).catch((error) => {
      this.log.warn("systemd was not notified", asError(error));
    });
  }
}

function statusField(text: string): string {
  return `STATUS=${text.replaceAll("\n", " ")}`;
}
