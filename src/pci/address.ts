import { VhostdError } from "../base/errors.ts";

/** A PCI address in its one spelling, "0000:af:04.5". Made by parsePciAddress only. */
export type PciAddress = string & { readonly __brand: "PciAddress" };

const PATTERN = /^(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])$/;

/**
 * Reads an address as people write it: with or without domain, in either case.
 * @throws VhostdError badArguments
 */
export function parsePciAddress(text: string): PciAddress {
  const match = PATTERN.exec(text.toLowerCase());
  if (match === null) {
    throw new VhostdError("badArguments", `${JSON.stringify(text.slice(0, 64))} is not a PCI address`, {
      fix: "write it as domain:bus:device.function, for example 0000:af:04.5",
    });
  }
  const [, domain = "0000", bus, device, fn] = match;
  return `${domain}:${bus}:${device}.${fn}` as PciAddress;
}
