import { asError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { ForwardedRequest } from "../native/ring-engine.ts";
import { AdminStatus } from "../virtio/admin/vendor.ts";
import { type AdminCommand, decodeCommand, execute } from "./admin-commands.ts";
import { AdminError } from "./admin-error.ts";
import type { Fault } from "./admin-faults.ts";
import { CommandQueue, Pace } from "./command-queue.ts";
import type { ManagedVf } from "./managed-vf.ts";
import type { PfSettings } from "./pf-options.ts";
import type { RequestSource } from "./request-service.ts";

/** The end of a command: its status byte, and a result where that is "ok". */
type Answer = (status: number, result?: Uint8Array) => void;

/**
 * Serves the PF's admin virtqueue. Commands on different VFs run side by side and complete as they are ready; those on
 * one VF run in the order they came. Whatever is asked for, the event loop has a turn between two commands.
 */
export class AdminService {
  private readonly queues = new Map<number, CommandQueue>();
  private readonly pace = new Pace();
  /** Wakes those that make a command last. */
  private readonly pauses = new Set<() => void>();
  /** Resets of the PF so far: commands that came before are not answered any more. */
  private resets = 0;

  /**
   * @param queue the admin virtqueue, where there is one; others are not served
   * @param vfs by number; there may be more later
   */
  constructor(
    private readonly queue: number | undefined,
    private readonly vfs: () => readonly ManagedVf[],
    private readonly settings: PfSettings,
    private readonly log: Logger,
  ) {}

  /** Takes what has come. */
  serve(rings: RequestSource): void {
    for (const request of rings.takeRequests()) this.take(request, rings);
  }

  /**
   * The PF was reset: nobody waits for an answer, what was transferred by halves is dropped, and no pages are marked any
   * more. What has begun on a VF comes to its end.
   */
  forget(): void {
    this.resets++;
    for (const queue of this.queues.values()) queue.clear();
    for (const wake of this.pauses) wake();
    for (const vf of this.vfs()) {
      vf.forget();
      vf.tracker.forget();
    }
  }

  private take({ id, queue, readable, writable }: ForwardedRequest, rings: RequestSource): void {
    if (queue !== this.queue || writable === 0) {
      this.log.warn(`a chain of queue ${queue} with room for ${writable} bytes is no admin command`);
      rings.answer(id, new Uint8Array(0));
      return;
    }
    const room = writable - 1;
    const { resets } = this;
    const answer: Answer = (status, result) => {
      if (resets !== this.resets) return;
      const bytes = new Uint8Array(writable);
      if (result !== undefined) bytes.set(result);
      bytes[room] = status;
      rings.answer(id, bytes);
    };
    try {
      const command = decodeCommand(readable, room, this.settings.tracking);
      const run = () => this.perform(command, answer);
      const commands = this.queueOf(command);
      if (commands !== undefined) commands.add(run);
      else void this.pace.turn().then(() => (resets === this.resets ? run() : undefined));
    } catch (error) {
      this.refuse(error, answer);
    }
  }

  /** Never rejects. */
  private async perform(command: AdminCommand, answer: Answer): Promise<void> {
    const vf = "vdevId" in command ? command.vdevId - 1 : undefined;
    const began = performance.now();
    const last = () => this.pause(this.settings.delays.of(command.name) - (performance.now() - began));
    try {
      const fault = this.settings.faults.take(command.name, vf);
      if (fault === "silence") {
        this.log.info(`admin command ${command.name} is never answered, as asked`);
        return await last();
      }
      if (fault !== undefined) throw faultError(fault);
      const result = await execute(command, this.vfs());
      await last();
      answer(AdminStatus.ok, result);
    } catch (error) {
      await last();
      this.refuse(error, answer);
    }
  }

  private refuse(error: unknown, answer: Answer): void {
    const refusal = error instanceof AdminError ? error : new AdminError("internal", asError(error).message);
    this.log.warn(`an admin command is refused (${refusal.code}${refusal.retry ? ", retry" : ""})`, error);
    answer(refusal.status);
  }

  /** Those of one VF; undefined for a command that is on none. */
  private queueOf(command: AdminCommand): CommandQueue | undefined {
    if (!("vdevId" in command) || this.vfs()[command.vdevId - 1] === undefined) return undefined;
    const queue = this.queues.get(command.vdevId) ?? new CommandQueue(this.pace);
    this.queues.set(command.vdevId, queue);
    return queue;
  }

  private async pause(milliseconds: number): Promise<void> {
    if (milliseconds <= 0) return;
    const { promise, resolve } = Promise.withResolvers<void>();
    this.pauses.add(resolve);
    const timer = setTimeout(resolve, milliseconds);
    await promise;
    clearTimeout(timer);
    this.pauses.delete(resolve);
  }
}

function faultError(fault: Exclude<Fault, "silence">): AdminError {
  return fault === "retry"
    ? new AdminError("error", "as asked: try again", true)
    : new AdminError("internal", "as asked: failed");
}
