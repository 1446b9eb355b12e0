import { VhostdError } from "../../../src/base/errors.ts";
import { type DriverMemory, GuestMemoryFile } from "../guest-memory-file.ts";

/** Where regions begin in the address space that the front-end pretends to have. */
const USER_BASE = 0x7f00_0000_0000;
/** Between two regions, so that a mistake does not fall into the next one by luck. Bytes. */
const GAP = 1 << 30;

export interface MemoryRegion {
  readonly file: GuestMemoryFile;
  readonly userAddress: number;
}

/** Guest memory of several regions, each a memfd. */
export class FrontendMemory implements DriverMemory, Disposable {
  readonly regions: MemoryRegion[] = [];
  /** Is told of what the guest's driver writes. */
  onWrite: (gpa: number, length: number) => void = () => {};

  constructor(regions: readonly { readonly gpa: number; readonly size: number }[] = []) {
    for (const { gpa, size } of regions) this.add(gpa, size);
  }

  add(gpa: number, size: number): MemoryRegion {
    return this.put(new GuestMemoryFile(gpa, size));
  }

  /** A region of another front-end's memory: both are of one VM. */
  share({ file }: MemoryRegion): MemoryRegion {
    return this.put(file.share());
  }

  /** Forgets the region; its memfd is closed. */
  drop(region: MemoryRegion): void {
    this.regions.splice(this.regions.indexOf(region), 1);
    region.file[Symbol.dispose]();
  }

  read(gpa: number, length: number): Uint8Array {
    return this.at(gpa).file.read(gpa, length);
  }

  write(gpa: number, bytes: Uint8Array): void {
    this.at(gpa).file.write(gpa, bytes);
    this.onWrite(gpa, bytes.length);
  }

  /** Guest-physical, exclusive. */
  get end(): number {
    return Math.max(0, ...this.regions.map(({ file }) => file.gpa + file.size));
  }

  /** Goes on with the regions of another, which is left without any. The own ones are closed. */
  become(other: FrontendMemory): void {
    const before = this.regions.splice(0, Infinity, ...other.regions.splice(0));
    for (const { file } of before) file[Symbol.dispose]();
  }

  userAddress(gpa: number): number {
    const { file, userAddress } = this.at(gpa);
    return userAddress + (gpa - file.gpa);
  }

  [Symbol.dispose](): void {
    for (const { file } of this.regions) file[Symbol.dispose]();
  }

  private put(file: GuestMemoryFile): MemoryRegion {
    const region = { file, userAddress: USER_BASE + file.gpa + this.regions.length * GAP };
    this.regions.push(region);
    return region;
  }

  private at(gpa: number): MemoryRegion {
    const region = this.regions.find(({ file }) => gpa >= file.gpa && gpa < file.gpa + file.size);
    if (region === undefined) throw new VhostdError("badAddress", `0x${gpa.toString(16)} is not guest memory`);
    return region;
  }
}
