import { asError } from "../base/errors.ts";
import type { RingEngine } from "../native/ring-engine.ts";
import type { SoftDevice, SoftRequest } from "../plugin.ts";

export type RequestSource = Pick<RingEngine, "takeRequests" | "answer">;

/** Of its device: `serve`, and what is to be told. */
export interface RequestServer {
  serve: NonNullable<SoftDevice["serve"]>;
  /** The device cannot go on. */
  fail(reason: string): void;
}

/**
 * Has a class answer the requests of its device, with the worker "forward". Requests are served side by side and
 * completed as they are ready; one that comes after a reset or in another device's place is a new one.
 */
export class RequestService {
  /** Times that all was forgotten: an error of a request from before says nothing about the device as it is now. */
  private epoch = 0;

  constructor(private readonly device: RequestServer) {}

  /** Takes what has come. */
  serve(rings: RequestSource): void {
    for (const { id, queue, readable, writable } of rings.takeRequests()) {
      void this.answer({ queue, readable, writable }, (bytes) => rings.answer(id, bytes));
    }
  }

  /** The device was reset, or another took its place: nobody waits for the answers. */
  forget(): void {
    this.epoch++;
  }

  /** Never rejects. */
  private async answer(request: SoftRequest, complete: (bytes: Uint8Array) => void): Promise<void> {
    const { epoch } = this;
    const current = () => epoch === this.epoch;
    try {
      const bytes = await this.device.serve(request);
      if (!(bytes instanceof Uint8Array)) throw new Error(`it was answered with ${typeof bytes}, not with bytes`);
      if (current()) complete(bytes);
    } catch (error) {
      if (current()) this.device.fail(`a request of queue ${request.queue} failed: ${asError(error).message}`);
    }
  }
}
