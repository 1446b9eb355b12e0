/** An address as `u48` of the configuration space has it, first byte lowest: "02:00:00:00:00:01". */
export function macText(mac: bigint): string {
  return macBytes(mac)
    .map((byte) => byte.toString(16).padStart(2, "0"))
    .join(":");
}

/** Why a device cannot have this address; undefined where it can. */
export function macProblem(mac: bigint): string | undefined {
  if (mac === 0n) return "it is all zeroes";
  return (mac & 1n) === 1n ? "it is a group address (the lowest bit of its first byte is set)" : undefined;
}

/**
 * Reads "02:00:00:00:00:00", or the same with "+N": the address that is N further on, in its last three bytes.
 * @returns undefined where it is neither, or there is no such address
 */
export function parseMac(text: string): bigint | undefined {
  const match = /^((?:[0-9a-f]{2}:){5}[0-9a-f]{2})(?:\+(\d{1,8}))?$/i.exec(text);
  if (match === null) return undefined;
  const bytes = match[1]!.split(":").map((byte) => Number.parseInt(byte, 16));
  const last = bytes.slice(3).reduce((value, byte) => value * 256 + byte, 0) + Number(match[2] ?? 0);
  if (last > 0xff_ffff) return undefined;
  const moved = [...bytes.slice(0, 3), last >> 16, (last >> 8) & 0xff, last & 0xff];
  return moved.reduceRight((value, byte) => (value << 8n) | BigInt(byte), 0n);
}

function macBytes(mac: bigint): number[] {
  return Array.from({ length: 6 }, (_, index) => Number((mac >> BigInt(8 * index)) & 0xffn));
}
