import { asError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import { OperationQueue } from "../base/operation-queue.ts";
import type { ForwardedRequest, RingEngine } from "../native/ring-engine.ts";
import { AdminStatus } from "../virtio/admin/vendor.ts";
import { type AdminCommand, decodeCommand, execute } from "./admin-commands.ts";
import { AdminError } from "./admin-error.ts";
import type { Fault } from "./admin-faults.ts";
import type { ManagedVf } from "./managed-vf.ts";
import type { PfSettings } from "./pf-options.ts";

export type RequestSource = Pick<RingEngine, "takeRequests" | "answer">;

/**
 * Serves the PF's admin virtqueue. Commands on different VFs run side by side and complete as they are ready; those on
 * one VF run in the order they came.
 */
export class AdminService {
  private readonly turns = new Map<number, OperationQueue>();
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
    for (const request of rings.takeRequests()) {
      const { resets } = this;
      const answer = (bytes: Uint8Array) => {
        if (resets === this.resets) rings.answer(request.id, bytes);
      };
      this.run(request, answer).catch((error) => this.log.error("an admin command got lost", error));
    }
  }

  /** The PF was reset: nobody waits for an answer. What has begun on a VF comes to its end. */
  forget(): void {
    this.resets++;
    for (const wake of this.pauses) wake();
  }

  private async run({ queue, readable, writable }: ForwardedRequest, answer: (bytes: Uint8Array) => void) {
    if (queue !== this.queue || writable === 0) {
      this.log.warn(`a chain of queue ${queue} with room for ${writable} bytes is no admin command`);
      return answer(new Uint8Array(0));
    }
    const room = writable - 1;
    const { resets } = this;
    let status: number = AdminStatus.ok;
    let result: Uint8Array = new Uint8Array(0);
    try {
      const command = decodeCommand(readable, room);
      const done = await this.inTurn(command, async () => {
        if (resets !== this.resets) return undefined;
        return this.perform(command);
      });
      if (done === undefined) return;
      result = done;
    } catch (error) {
      const refusal = error instanceof AdminError ? error : new AdminError("internal", asError(error).message);
      this.log.warn(`an admin command is refused (${refusal.code}${refusal.retry ? ", retry" : ""})`, error);
      ({ status } = refusal);
    }
    const bytes = new Uint8Array(writable);
    bytes.set(result);
    bytes[room] = status;
    answer(bytes);
  }

  /** @returns the result, or undefined where there is no answer. @throws AdminError */
  private async perform(command: AdminCommand): Promise<Uint8Array | undefined> {
    const vf = command.name === "identity" ? undefined : command.vdevId - 1;
    const began = performance.now();
    try {
      const fault = this.settings.faults.take(command.name, vf);
      if (fault === "silence") {
        this.log.info(`admin command ${command.name} is never answered, as asked`);
        return undefined;
      }
      if (fault !== undefined) throw faultError(fault);
      return await execute(command, this.vfs());
    } finally {
      await this.pause(this.settings.delays.of(command.name) - (performance.now() - began));
    }
  }

  private inTurn<T>(command: AdminCommand, run: () => Promise<T>): Promise<T> {
    if (command.name === "identity" || this.vfs()[command.vdevId - 1] === undefined) return run();
    const turns = this.turns.get(command.vdevId) ?? new OperationQueue();
    this.turns.set(command.vdevId, turns);
    return turns.run(run);
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
