import { VhostdError } from "../../base/errors.ts";
import type { OwnedFd } from "../../native/fd.ts";
import { Mapping } from "../../native/mmio.ts";
import { relayKick } from "../../native/relay.ts";
import { signalEventfd } from "../../native/sys.ts";
import type { Doorbell, DoorbellPage } from "../function.ts";
import type { VfioUserRegion } from "./region.ts";
import type { IoEventfd, RegionInfo } from "./replies.ts";

/** A doorbell is a register of 16 bits (VIRTIO 1.2, 4.1.5.2). */
const WIDTH = 2;

/** Of x86-64; on a machine with larger pages a server's areas must be aligned to those. */
export const PAGE_SIZE = 4096;

/** Where the server lets a region be written without a message; the fds belong to the function. */
export interface FastPaths {
  readonly eventfds: readonly (IoEventfd & { readonly owned: OwnedFd })[];
  readonly mappable: RegionInfo["mappable"];
  readonly file: OwnedFd | undefined;
}

/**
 * The ways to a doorbell, best first: an eventfd that the server waits on, a mapping of its region, a message. The
 * relay, which is no part of JavaScript, cannot send messages.
 */
export class VfioUserDoorbell implements Doorbell {
  constructor(
    private readonly region: VfioUserRegion,
    private readonly offset: number,
    private readonly paths: FastPaths,
    private readonly name: string,
    readonly takeKick: Doorbell["takeKick"],
  ) {
    if (offset + WIDTH > region.size) {
      throw new VhostdError("barRead", `${name} lies outside its region of ${region.size} bytes`);
    }
  }

  async ring(value: number): Promise<void> {
    const eventfd = this.eventfd(value);
    if (eventfd === undefined) await this.region.write(this.offset, WIDTH, value);
    else signalEventfd(eventfd);
  }

  connect(kick: number, value: number): Disposable {
    const eventfd = this.eventfd(value);
    if (eventfd !== undefined) return relayKick(kick, { eventfd });
    const page = this.share();
    if (page === undefined) {
      throw new VhostdError("notSupported", `${this.name} can be reached by messages only`, {
        fix: "use a vfio-user server that answers GET_REGION_IO_FDS, or lets its doorbells be mapped",
      });
    }
    using undo = new DisposableStack();
    const mapping = undo.use(Mapping.map(page.fd, page.offset, page.size, "read-write"));
    const offset = this.offset % PAGE_SIZE;
    // Disposed of in reverse: the relay lets go before the mapping does.
    undo.use(relayKick(kick, { mapping, offset, width: WIDTH, value }));
    return undo.move();
  }

  /** The page around the doorbell, no more: what else can be mapped is not the front-end's. */
  get page(): DoorbellPage | undefined {
    const { mappable, file } = this.paths;
    if (mappable === null || file === undefined) return undefined;
    const page = this.offset - (this.offset % PAGE_SIZE);
    const whole = mappable.areas.some(({ offset, size }) => page >= offset && page + PAGE_SIZE <= offset + size);
    return whole ? { offset: mappable.fileOffset + page, size: PAGE_SIZE } : undefined;
  }

  share(): (DoorbellPage & { readonly fd: number }) | undefined {
    const { page } = this;
    const { file } = this.paths;
    return page === undefined || file === undefined ? undefined : { fd: file.number, ...page };
  }

  private eventfd(value: number): number | undefined {
    const fits = ({ offset, size, match }: IoEventfd) =>
      offset === this.offset && (size === 0 || size === WIDTH) && (match === null || match === value);
    return this.paths.eventfds.find(fits)?.owned.number;
  }
}
