/** Fields of a bzImage's header (Linux Documentation/arch/x86/boot.rst). */
const SETUP_SECTORS = 0x1f1;
const PAYLOAD_OFFSET = 0x248;
const PAYLOAD_LENGTH = 0x24c;
/** The length of what was packed stands behind the packed data. */
const LENGTH_SIZE = 4;

const UNPACKERS: readonly { readonly magic: readonly number[]; unpack(data: Uint8Array): Promise<Uint8Array> }[] = [
  { magic: [0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00], unpack: unpackXz },
  { magic: [0x28, 0xb5, 0x2f, 0xfd], unpack: (data) => Bun.zstdDecompress(data) },
];

/**
 * The ELF file in a bzImage, which QEMU starts by its PVH entry. Unpacking is more than half of a boot where QEMU
 * emulates the processor.
 * @throws Error where it is packed in a way that is not known here
 */
export async function unpackKernel(image: Uint8Array): Promise<Uint8Array> {
  const view = new DataView(image.buffer, image.byteOffset, image.byteLength);
  const start = (view.getUint8(SETUP_SECTORS) + 1) * 512 + view.getUint32(PAYLOAD_OFFSET, true);
  const payload = image.subarray(start, start + view.getUint32(PAYLOAD_LENGTH, true) - LENGTH_SIZE);
  const unpacker = UNPACKERS.find(({ magic }) => magic.every((byte, index) => payload[index] === byte));
  if (!unpacker) throw new Error(`the kernel is packed in an unknown way: ${payload.subarray(0, 6).toHex()}`);
  return await unpacker.unpack(payload);
}

/** @throws Error where the data is not what xz has packed */
export async function unpackXz(data: Uint8Array): Promise<Uint8Array> {
  const child = Bun.spawn(["xz", "--decompress", "--stdout"], { stdin: data, stdout: "pipe", stderr: "pipe" });
  const [content, errors, code] = await Promise.all([child.stdout.bytes(), child.stderr.text(), child.exited]);
  if (code !== 0) throw new Error(`xz ended with ${code}: ${errors.trim()}`);
  return content;
}
