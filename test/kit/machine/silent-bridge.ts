import { join } from "node:path";
import { openFile, pread, pwrite } from "../../../src/native/sys.ts";

/** Of a bridge's configuration space: secondary and subordinate bus number (PCI-to-PCI Bridge 1.2, 3.2.5). */
const BUS_NUMBERS = 0x19;

/**
 * A bridge forgets which bus is behind it: configuration space of the functions there reads as all ones, as that of a
 * function that has lost its link.
 * @param address PCI address of the bridge
 * @returns dispose makes it answer again
 */
export function silenceBehind(address: string): Disposable {
  const path = join("/sys/bus/pci/devices", address, "config");
  const before = new Uint8Array(2);
  using file = openFile(path, "read-write");
  pread(file.number, before, BUS_NUMBERS);
  pwrite(file.number, new Uint8Array(2), BUS_NUMBERS);
  return {
    [Symbol.dispose]() {
      using again = openFile(path, "read-write");
      pwrite(again.number, before, BUS_NUMBERS);
    },
  };
}
