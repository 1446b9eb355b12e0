import { VhostdError } from "../../base/errors.ts";
import type { Doorbell, DoorbellPage } from "../function.ts";
import type { ConnectedKicks } from "./kicks.ts";
import type { DeviceFile, VfioRegion } from "./region.ts";

/** A doorbell is a register of 16 bits (VIRTIO 1.2, 4.1.5.2). */
const WIDTH = 2;

/** What a doorbell needs of its function. */
export interface DoorbellOwner {
  readonly file: DeviceFile;
  readonly kicks: ConnectedKicks;
  /** These bytes of its region may be given away. */
  mayLend(offset: number, size: number): boolean;
  /** Whoever has the fd that is given away may do with the function what he likes. Called before. */
  lend(): void;
}

/** A place in a region that is written to announce buffers. */
export class VfioDoorbell implements Doorbell {
  private readonly name: string;

  /** @throws VhostdError barRead */
  constructor(
    private readonly region: VfioRegion,
    private readonly offset: number,
    private readonly owner: DoorbellOwner,
  ) {
    this.name = `doorbell 0x${offset.toString(16)} in ${region.name}`;
    if (!Number.isInteger(offset) || offset < 0 || offset + WIDTH > region.size) {
      throw new VhostdError("barRead", `${this.name} lies outside its region of ${region.size} bytes`);
    }
  }

  ring(value: number): Promise<void> {
    return this.region.write(this.offset, WIDTH, value);
  }

  /** @throws VhostdError again during a reset: the relay, which serves all functions, would wait for it */
  connect(kick: number, value: number): Disposable {
    if (!this.region.isMappable(this.offset, WIDTH)) throw this.notMappable();
    const { kicks, file } = this.owner;
    if (file.gate.shut) throw new VhostdError("again", `${this.name} is not to be reached while its function is reset`);
    return kicks.connect(kick, { relay: () => this.relayTarget(value), ring: () => this.ring(value) });
  }

  /**
   * The page around the doorbell, no more; none that has interrupts of the function in it. What else is in it is for the
   * driver to know. A function that is mapped elsewhere stays open when it is closed here, and only a reset takes it back:
   * one that has none is not given away.
   */
  get page(): DoorbellPage | undefined {
    const size = this.owner.file.pageSize;
    const offset = this.offset - (this.offset % size);
    if (!this.region.isMappable(offset, size) || !this.owner.mayLend(offset, size)) return undefined;
    return { offset: this.region.place.fileOffset + offset, size };
  }

  /** The fd is that of the whole function: it was lent from now on. */
  share(): (DoorbellPage & { readonly fd: number }) | undefined {
    const { page } = this;
    if (page === undefined) return undefined;
    this.owner.lend();
    return { fd: this.owner.file.number, ...page };
  }

  private relayTarget(value: number) {
    const place = this.region.mappingAt(this.offset, WIDTH);
    if (place === undefined) throw this.notMappable();
    return { ...place, width: WIDTH, value } as const;
  }

  private notMappable(): VhostdError {
    return new VhostdError("notSupported", `${this.name} cannot be mapped, so that kicks cannot be relayed to it`);
  }
}
