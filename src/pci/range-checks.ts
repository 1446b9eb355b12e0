import { VhostdError } from "../base/errors.ts";
import { fileInfo } from "../native/sys.ts";
import type { DmaRange } from "./address-space.ts";
import { describe, type Extent, extentOf, subtract } from "./ranges.ts";

/**
 * @param pageSize smallest unit of a mapping, bytes
 * @param usable what the IOMMU can map
 * @throws VhostdError invalid where it is no range of whole pages; iommuDomain where the IOMMU cannot take it
 */
export function checkRange(range: DmaRange, pageSize: number, usable: readonly Extent[]): void {
  const { iova, size, offset } = range;
  const end = iova + size;
  const whole = [iova, size, offset, end, offset + size].every((value) => Number.isSafeInteger(value) && value >= 0);
  if (!whole || size === 0) {
    throw new VhostdError("invalid", `guest memory of ${size} bytes at ${iova}, offset ${offset}: not a range`);
  }
  const where = describe(extentOf(range));
  if ([iova, size, offset].some((value) => value % pageSize !== 0)) {
    throw new VhostdError(
      "invalid",
      `guest memory ${where} at offset 0x${offset.toString(16)} of its file cannot be mapped: its begin, length and offset must be multiples of ${pageSize} bytes`,
    );
  }
  const [hole] = subtract(extentOf(range), usable);
  if (hole !== undefined) {
    throw new VhostdError("iommuDomain", `guest memory ${where} meets ${describe(hole)}, which the IOMMU cannot map`, {
      fix: "give the guest less memory, or move its memory around the hole",
      data: { start: hole.start, end: hole.end - 1 },
    });
  }
  // A union of two usable ranges is not one: a mapping that crosses their border may be refused in its middle.
  if (!usable.some((one) => one.start <= iova && end <= one.end)) {
    throw new VhostdError("iommuDomain", `guest memory ${where} crosses the border of two ranges of the IOMMU`);
  }
}

/**
 * A file may end inside its last page: memory is mapped, and kept, by whole pages.
 * @throws VhostdError invalid where the fd is another file than the range says, or the range ends beyond its last page
 */
export function checkFile(range: DmaRange, fd: number): void {
  checkIdentity(range, fd);
  const { size, pageSize } = fileInfo(fd);
  if (range.offset + range.size > Math.ceil(size / pageSize) * pageSize) {
    const where = describe(extentOf(range));
    throw new VhostdError("invalid", `guest memory ${where} ends at ${range.offset + range.size} of a file of ${size}`);
  }
}

/** @throws VhostdError invalid where the fd is another file than the range says */
export function checkIdentity(range: DmaRange, fd: number): void {
  const { dev, ino } = fileInfo(fd);
  if (dev === range.file.dev && ino === range.file.ino) return;
  const where = describe(extentOf(range));
  throw new VhostdError("invalid", `guest memory ${where} came with another file than the one it names`);
}
