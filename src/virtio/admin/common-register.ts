import { fieldSize } from "../../base/layout.ts";
import type { AccessWidth } from "../../pci/function.ts";
import type { VirtioPciDevice } from "../pci-device.ts";
import { COMMON_CONFIG } from "../registers.ts";

/** Registers that only the management of a device looks at (4.1.4.3). */
type ManagementRegister = "configGeneration" | "adminQueueIndex" | "adminQueueNum";

/** A register of the common configuration; 0 where the device's is too short to have it. */
export async function readCommonRegister(
  { fn, layout }: VirtioPciDevice,
  register: ManagementRegister,
): Promise<number> {
  const [offset, type] = COMMON_CONFIG[register];
  const width = fieldSize(type) as AccessWidth;
  if (offset + width > layout.common.size) return 0;
  return fn.region(layout.common.bar).read(layout.common.offset + offset, width);
}
