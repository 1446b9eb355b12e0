import { Deadline } from "../../base/deadline.ts";
import { VhostdError } from "../../base/errors.ts";
import type { Json } from "../../base/json.ts";
import { OperationQueue } from "../../base/operation-queue.ts";
import type { OwnedFd } from "../../native/fd.ts";
import { slowClose } from "../../native/slow.ts";
import { fileInfo } from "../../native/sys.ts";
import { Region } from "../../vfio-user/messages.ts";
import type { PciAddress } from "../address.ts";
import type { BusEntry } from "../bus.ts";
import type { Doorbell, FunctionSnapshot, PciFunction } from "../function.ts";
import { DeviceAccesses } from "./accesses.ts";
import { errnoOf, KERNEL_CALLS, type RegionPlace, VfioDevice } from "./device.ts";
import { type DoorbellOwner, VfioDoorbell } from "./doorbell.ts";
import { AccessGate } from "./gate.ts";
import { VfioInterrupts } from "./interrupts.ts";
import { ConnectedKicks } from "./kicks.ts";
import { LOSS_FDS, LossWatch } from "./loss.ts";
import { type BarRange, msixRanges } from "./msix.ts";
import { checkFds, DEVICE_FD, parseFunctionRecord } from "./record.ts";
import { type DeviceFile, VfioRegion } from "./region.ts";

const BARS = [0, 1, 2, 3, 4, 5] as const;
/** Bytes of a conventional configuration space. */
const CONFIG_SIZE_LEAST = 256;
const EAGAIN = 11;
/** Milliseconds between two tries of a reset while somebody else has the device locked. */
const RESET_RETRY = 20;
/** Milliseconds that closing waits for a call into the kernel under way, which keeps the device open. */
const CLOSE_PATIENCE = 5_000;

/** What of a function does not change while it is open. */
interface Parts {
  readonly device: VfioDevice;
  readonly canReset: boolean;
  readonly configPlace: RegionPlace;
  readonly bars: readonly RegionPlace[];
  /** What interrupts need of the BARs. */
  readonly msix: readonly BarRange[];
  readonly accesses: DeviceAccesses;
  readonly interrupts: VfioInterrupts;
  readonly loss: LossWatch;
  readonly operations: OperationQueue;
}

/**
 * A PCI function through the fd of its VFIO device.
 *
 * While the kernel resets a device, whoever touches its registers or its configuration is made to wait. Here accesses
 * wait as promises instead, and kicks that are connected are cut before: the driver, which has to set the device up
 * anew in any case, connects them again.
 *
 * Who was given a doorbell has the whole function, and may reset it without an end. A function that was lent is therefore
 * accessed by reading and writing its file on a thread, for good; nothing of it is mapped, and no kick is the relay's. Its
 * configuration space is accessed so always: an operator may reset it, too.
 */
export class VfioFunction implements PciFunction {
  readonly config: VfioRegion;
  readonly interrupts: VfioInterrupts;
  readonly lost: Promise<Error>;
  private readonly gate = new AccessGate();
  private readonly kicks = new ConnectedKicks();
  private readonly file: DeviceFile;
  private lent = false;
  /** By BAR; mapped when first asked for. */
  private readonly regions = new Map<number, VfioRegion>();
  private closing: Promise<void> | undefined;

  private constructor(
    readonly address: PciAddress,
    private readonly owned: OwnedFd,
    private readonly leave: () => void,
    private readonly parts: Parts,
  ) {
    const { pageSize } = fileInfo(owned.number);
    this.file = {
      get number() {
        return owned.number;
      },
      pageSize,
      gate: this.gate,
      accesses: parts.accesses,
    };
    this.config = new VfioRegion(`the configuration space of ${address}`, this.file, parts.configPlace, "by file");
    this.interrupts = parts.interrupts;
    this.lost = parts.loss.lost;
    parts.loss.check(this.config);
  }

  /**
   * A function whose device was opened just now. All its vectors are enabled, and go nowhere.
   * @param device the fd of the VFIO device; taken, closed on failure too
   * @param leave called once when that fd has been closed, on failure too
   * @param calls what stands in for the kernel in tests
   * @throws VhostdError; timedOut
   */
  static async over(
    entry: BusEntry,
    device: OwnedFd,
    leave: () => void,
    deadline: Deadline,
    calls = KERNEL_CALLS,
  ): Promise<VfioFunction> {
    const { address } = entry;
    await using undo = new AsyncDisposableStack();
    undo.defer(leave);
    undo.defer(() => slowClose(device));
    const vfio = new VfioDevice(() => device.number, address, calls.ioctl);
    const accesses = new DeviceAccesses(() => device.number, calls.access);
    const operations = new OperationQueue();
    const ask = async () => {
      const { canReset } = await vfio.info();
      const [configPlace, ...bars] = await Promise.all([Region.config, ...BARS].map((index) => vfio.region(index)));
      if (configPlace === undefined || configPlace.size < CONFIG_SIZE_LEAST) {
        throw new VhostdError("probeFailed", `${address} has ${configPlace?.size} bytes of configuration space`);
      }
      const [config, interrupts] = await Promise.all([
        accesses.readBytes(configPlace.fileOffset, CONFIG_SIZE_LEAST),
        VfioInterrupts.enable(vfio, operations),
      ]);
      return { device: vfio, canReset, configPlace, bars, msix: msixRanges(config), accesses, interrupts, operations };
    };
    const watching = LossWatch.on(vfio);
    const [known, loss] = await deadline.race(Promise.all([ask(), watching])).catch((error: unknown) => {
      // It may still come.
      watching.then((late) => late[Symbol.dispose]()).catch(() => {});
      throw error;
    });
    undo.use(loss);
    const fn = new VfioFunction(address, device, leave, { ...known, loss });
    undo.move();
    return fn;
  }

  /**
   * Goes on with a function as another process left it. Nothing is asked of the device: its vectors are enabled, and go where
   * they went. Takes the fds.
   * @param leave called once when its device was closed, on failure too
   * @throws VhostdError invalid where the record or the fds do not fit
   */
  static revive(
    { address }: BusEntry,
    leave: () => void,
    data: Json,
    fds: ReadonlyMap<string, OwnedFd>,
    calls = KERNEL_CALLS,
  ): VfioFunction {
    using undo = new DisposableStack();
    undo.defer(leave);
    for (const fd of fds.values()) undo.use(fd);
    const { canReset, lent, msix, config: configPlace, bars, vectors } = parseFunctionRecord(data);
    const owned = checkFds(fds, address, [DEVICE_FD], LOSS_FDS)(DEVICE_FD);
    const device = new VfioDevice(() => owned.number, address, calls.ioctl);
    const operations = new OperationQueue();
    const loss = undo.use(LossWatch.revive(device, fds));
    const fn = new VfioFunction(address, owned, leave, {
      ...{ device, canReset, configPlace, bars, msix, operations, loss },
      accesses: new DeviceAccesses(() => owned.number, calls.access),
      interrupts: VfioInterrupts.revive(device, operations, vectors),
    });
    if (lent) fn.lend();
    undo.move();
    return fn;
  }

  /** The fd of the VFIO device, borrowed, for what an address space asks of it. */
  get deviceFd(): number {
    return this.owned.number;
  }

  region(bar: number): VfioRegion {
    const known = this.regions.get(bar);
    if (known !== undefined) return known;
    const place = this.parts.bars[bar];
    if (place === undefined || place.size === 0) throw new VhostdError("barRead", `${this.address} has no BAR ${bar}`);
    const access = this.lent ? "by file" : "mapped";
    const region = new VfioRegion(`BAR ${bar} of ${this.address}`, this.file, place, access);
    this.regions.set(bar, region);
    return region;
  }

  doorbell(bar: number, offset: number): Doorbell {
    const owner: DoorbellOwner = {
      file: this.file,
      kicks: this.kicks,
      mayLend: (at, size) => this.parts.canReset && !this.hasInterrupts(bar, at, size),
      lend: () => this.lend(),
    };
    return new VfioDoorbell(this.region(bar), offset, owner);
  }

  /**
   * Function-level reset by the kernel, about 0.1 s. Eventfds of vectors and the command register survive it; connected
   * kicks are cut. Where the deadline passes, the kernel goes on and accesses wait until it has ended.
   * @throws VhostdError notSupported where the kernel knows no way to reset it alone; resetTimedOut
   */
  async reset(deadline: Deadline): Promise<void> {
    const { canReset, operations } = this.parts;
    if (!canReset) {
      throw new VhostdError("notSupported", `the kernel knows no way to reset ${this.address} alone`);
    }
    try {
      await deadline.race(operations.run(() => this.resetNow(deadline)));
    } catch (cause) {
      if (!(cause instanceof VhostdError && cause.code === "timedOut")) throw cause;
      throw new VhostdError("resetTimedOut", cause.message, { cause });
    }
  }

  snapshot(): FunctionSnapshot {
    const { canReset, configPlace, bars, msix, interrupts, loss } = this.parts;
    const { lent } = this;
    const place = ({ size, fileOffset, areas }: RegionPlace) => ({
      size,
      fileOffset,
      areas: areas.map(({ offset, size: bytes }) => ({ offset, size: bytes })),
    });
    return {
      data: {
        ...{ canReset, lent, msix: [...msix] },
        ...{ config: place(configPlace), bars: bars.map(place), vectors: interrupts.count },
      },
      fds: new Map([[DEVICE_FD, this.owned.number], ...loss.fds]),
    };
  }

  abandon(): void {
    if (this.closing !== undefined) return;
    this.closing = Promise.resolve();
    this.letGo();
    this.owned[Symbol.dispose]();
    this.leave();
  }

  /** The kernel resets the function when its last fd is closed and its last mapping is gone, about 0.1 s. */
  [Symbol.asyncDispose](): Promise<void> {
    this.closing ??= this.close();
    return this.closing;
  }

  private async close(): Promise<void> {
    this.letGo();
    const { operations, accesses } = this.parts;
    const patience = Deadline.after(CLOSE_PATIENCE, `the last operation on ${this.address}`);
    await patience.race(Promise.all([operations.run(async () => {}), accesses.settled()])).catch(() => {});
    try {
      await slowClose(this.owned);
    } finally {
      this.leave();
    }
  }

  private letGo(): void {
    const closed = new VhostdError("cancelled", `${this.address} was closed`);
    this.gate.end(closed);
    this.parts.accesses.end(closed);
    this.parts.loss[Symbol.dispose]();
    this.kicks.cut();
    for (const region of this.regions.values()) region[Symbol.dispose]();
    this.regions.clear();
  }

  /** Before anybody else has it: what is mapped by us is not unmapped under his resets. */
  private lend(): void {
    if (this.lent) return;
    this.lent = true;
    this.kicks.leaveRelay();
    for (const region of this.regions.values()) region.unmap();
  }

  private hasInterrupts(bar: number, at: number, size: number): boolean {
    return this.parts.msix.some(
      (range) => range.bar === bar && range.offset < at + size && at < range.offset + range.size,
    );
  }

  private async resetNow(deadline: Deadline): Promise<void> {
    deadline.check();
    this.kicks.cut();
    await this.gate.shutDuring(async () => {
      for (;;) {
        try {
          return await this.parts.device.reset();
        } catch (error) {
          if (errnoOf(error) !== EAGAIN) throw error;
        }
        deadline.check();
        await Bun.sleep(RESET_RETRY);
      }
    });
  }
}
