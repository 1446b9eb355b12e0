import { asError, VhostdError } from "../base/errors.ts";
import { decodeState, encodeState } from "../virtio/admin/state-blob.ts";
import type { InternalStatusName } from "../virtio/admin/vendor.ts";
import { AdminError } from "./admin-error.ts";
import { IncomingState } from "./incoming-state.ts";
import type { FreezeBehaviour } from "./pf-options.ts";
import type { VirtioDevice } from "./virtio-device.ts";

type Device = Pick<VirtioDevice, "internalStatus" | "resets" | "changeInternal" | "save" | "restore">;

/** One VF as the PF's administrator moves it. Commands come one after the other; a reset of the VF comes any time. */
export class ManagedVf {
  /** What is being read out, from the piece at 0 on. */
  private outgoing: { readonly blob: Uint8Array; readonly resets: number } | undefined;
  /** What is being brought in. Until it is whole and has been taken, the VF does not leave its frozen state. */
  private incoming: { readonly state: IncomingState; readonly resets: number; taken: boolean } | undefined;

  /** @param behaviour how the VF freezes now */
  constructor(
    private readonly device: Device,
    private readonly behaviour: () => FreezeBehaviour,
  ) {}

  get status(): InternalStatusName {
    return this.device.internalStatus;
  }

  /** @throws AdminError */
  async modify(to: InternalStatusName): Promise<void> {
    if (this.status === "freezed" && this.current(this.incoming)?.taken === false) {
      throw new AdminError("internal", "the state that was begun to be restored is not whole");
    }
    await command(() => this.device.changeInternal(to, this.behaviour() === "drain"));
    this.outgoing = this.incoming = undefined;
  }

  /** Size of the state, bytes. @throws AdminError */
  async pending(): Promise<number> {
    return (await this.snapshot()).length;
  }

  /** A piece of the state as it was when the piece at 0 was read. @throws AdminError */
  async save(offset: number, length: number): Promise<Uint8Array> {
    if (offset === 0) this.outgoing = { blob: await this.snapshot(), resets: this.device.resets };
    const blob = this.current(this.outgoing)?.blob;
    if (blob === undefined) throw new AdminError("dataTransfer", "no state is being saved: begin at offset 0");
    if (offset + length > blob.length) {
      throw new AdminError("dataTransfer", `${length} bytes at ${offset} of a state of ${blob.length}`);
    }
    return blob.subarray(offset, offset + length);
  }

  /** A piece of a state; the one at 0 begins anew. @throws AdminError */
  async restore(offset: number, piece: Uint8Array): Promise<void> {
    if (this.status !== "freezed") throw new AdminError("error", `a VF that is ${this.status} is not restored`);
    if (offset === 0) this.incoming = { state: new IncomingState(), resets: this.device.resets, taken: false };
    const incoming = this.current(this.incoming);
    if (incoming === undefined) throw new AdminError("dataTransfer", "no state is being restored: begin at offset 0");
    incoming.taken = false;
    const blob = incoming.state.add(offset, piece);
    if (blob === undefined) return;
    await command(() => this.device.restore(decodeState(blob)));
    incoming.taken = true;
    this.outgoing = undefined;
  }

  private async snapshot(): Promise<Uint8Array> {
    const lists = this.behaviour() !== "hold";
    return encodeState(await command(() => this.device.save(lists)));
  }

  /** What was begun before a reset is forgotten. */
  private current<T extends { readonly resets: number }>(transfer: T | undefined): T | undefined {
    return transfer?.resets === this.device.resets ? transfer : undefined;
  }
}

/** What the device refuses, in the words of the admin virtqueue. */
async function command<T>(run: () => Promise<T>): Promise<T> {
  try {
    return await run();
  } catch (error) {
    const { message } = asError(error);
    const code = error instanceof VhostdError ? error.code : undefined;
    switch (code) {
      case "notPermitted":
        throw new AdminError("error", message);
      case "invalid":
        throw new AdminError("dataTransfer", message);
      case "timedOut":
      case "cancelled":
        throw new AdminError("error", message, true);
      default:
        throw new AdminError("internal", message);
    }
  }
}
