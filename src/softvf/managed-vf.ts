import { decodeState, encodeState } from "../virtio/admin/state-blob.ts";
import type { InternalStatusName } from "../virtio/admin/vendor.ts";
import { AdminError, inAdminTerms } from "./admin-error.ts";
import { IncomingState } from "./incoming-state.ts";
import type { FreezeBehaviour } from "./pf-options.ts";
import type { VfTracker } from "./vf-tracker.ts";
import type { VirtioDevice } from "./virtio-device.ts";

type Device = Pick<VirtioDevice, "internalStatus" | "onReset" | "changeInternal" | "save" | "restore">;

/** A state that is brought in. Until one is whole and has been taken, the VF does not leave its frozen state. */
type Incoming =
  | { readonly kind: "none" }
  | { readonly kind: "begun"; readonly state: IncomingState }
  /** Some of it came, and nothing of that is kept. */
  | { readonly kind: "lost" };

const NONE: Incoming = { kind: "none" };
const LOST: Incoming = { kind: "lost" };

/**
 * One VF as the PF's administrator moves it. Commands come one after the other; a reset of the VF or of the PF comes any
 * time.
 */
export class ManagedVf {
  /** What is being read out, from the piece at 0 to the last. */
  private outgoing: Uint8Array | undefined;
  private incoming: Incoming = NONE;
  /** Times that what was begun was dropped: a command that lasted so long leaves nothing behind. */
  private epoch = 0;

  /** @param behaviour how the VF freezes now */
  constructor(
    private readonly device: Device,
    private readonly behaviour: () => FreezeBehaviour,
    readonly tracker: VfTracker,
  ) {
    device.onReset(() => {
      this.forget();
      this.incoming = NONE;
    });
  }

  get status(): InternalStatusName {
    return this.device.internalStatus;
  }

  /** Whoever transferred a state is gone. That one was begun stays known. */
  forget(): void {
    this.epoch++;
    this.outgoing = undefined;
    if (this.incoming.kind === "begun") this.incoming = LOST;
  }

  /** @throws AdminError */
  async modify(to: InternalStatusName): Promise<void> {
    if (this.status === "freezed" && this.incoming.kind !== "none") {
      throw new AdminError("internal", "the state that was begun to be restored is not whole");
    }
    await inAdminTerms(() => this.device.changeInternal(to, this.behaviour() === "drain"));
    this.outgoing = undefined;
  }

  /** Size of the state, bytes. @throws AdminError */
  async pending(): Promise<number> {
    return (await this.snapshot()).length;
  }

  /** A piece of the state as it was when the piece at 0 was read. @throws AdminError */
  async save(offset: number, length: number): Promise<Uint8Array> {
    const blob = offset === 0 ? await this.begin() : this.outgoing;
    if (blob === undefined) throw new AdminError("dataTransfer", "no state is being saved: begin at offset 0");
    const end = offset + length;
    if (end > blob.length) {
      throw new AdminError("dataTransfer", `${length} bytes at ${offset} of a state of ${blob.length}`);
    }
    if (end === blob.length) this.outgoing = undefined;
    return blob.subarray(offset, end);
  }

  /** A piece of a state; the one at 0 begins anew. A state that was taken or refused is over. @throws AdminError */
  async restore(offset: number, piece: Uint8Array): Promise<void> {
    if (this.status !== "freezed") throw new AdminError("error", `a VF that is ${this.status} is not restored`);
    if (piece.length === 0) throw new AdminError("dataTransfer", "a piece has no bytes");
    const incoming: Incoming = offset === 0 ? { kind: "begun", state: new IncomingState() } : this.incoming;
    if (incoming.kind !== "begun") {
      throw new AdminError("dataTransfer", "no state is being restored: begin at offset 0");
    }
    this.incoming = LOST;
    const blob = incoming.state.add(offset, piece);
    if (blob === undefined) {
      this.incoming = incoming;
      return;
    }
    await inAdminTerms(() => this.device.restore(decodeState(blob)));
    this.outgoing = undefined;
    this.incoming = NONE;
  }

  private async begin(): Promise<Uint8Array> {
    const { epoch } = this;
    const blob = await this.snapshot();
    if (epoch === this.epoch) this.outgoing = blob;
    return blob;
  }

  private async snapshot(): Promise<Uint8Array> {
    const lists = this.behaviour() !== "hold";
    return encodeState(await inAdminTerms(() => this.device.save(lists)));
  }
}
