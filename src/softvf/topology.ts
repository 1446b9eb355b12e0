import { VhostdError } from "../base/errors.ts";
import { type PciAddress, parsePciAddress } from "../pci/address.ts";

/** First VF Offset and VF Stride of the SR-IOV capability (PCIe 4.0, 9.3.3.9 and 9.3.3.10). */
const FIRST_VF_OFFSET = 1;
const VF_STRIDE = 1;
const ROUTING_IDS = 0x10000;

/**
 * The address of a VF: the PF's routing ID and then one after the other, over as many buses as it takes.
 * @throws VhostdError badArguments where the domain has no such routing ID
 */
export function vfAddress(pf: PciAddress, index: number): PciAddress {
  const [domain = "", bus = "", device = "", fn = ""] = pf.split(/[:.]/);
  const base = (Number.parseInt(bus, 16) << 8) | (Number.parseInt(device, 16) << 3) | Number(fn);
  const id = base + FIRST_VF_OFFSET + index * VF_STRIDE;
  if (id >= ROUTING_IDS) {
    throw new VhostdError("badArguments", `VF ${index} of ${pf} would lie beyond bus ff`, {
      fix: "ask for fewer VFs, or put the PF on a lower bus",
    });
  }
  const hex = (value: number) => value.toString(16).padStart(2, "0");
  return parsePciAddress(`${domain}:${hex(id >> 8)}:${hex((id >> 3) & 0x1f)}.${id & 7}`);
}
