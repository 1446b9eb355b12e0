import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";

/** Where the counter of boot-sector.S is on the disk, and how many copies of it. */
const COUNTER = { offset: 16 * 512, copies: (16 * 512) / 4 } as const;

/** The 512 bytes of boot-sector.S, made by the assembler of this machine. */
export async function assembleBootSector(): Promise<Uint8Array> {
  const work = await mkdtemp(join(tmpdir(), "boot-"));
  try {
    const object = join(work, "boot.o");
    const image = join(work, "boot.bin");
    await Bun.$`as --32 -o ${object} ${join(import.meta.dir, "boot-sector.S")}`.quiet();
    await Bun.$`ld -m elf_i386 -Ttext 0x7c00 --oformat binary -o ${image} ${object}`.quiet();
    return await readFile(image);
  } finally {
    await rm(work, { recursive: true, force: true });
  }
}

/** The counter in a disk image. @throws Error when its copies differ */
export async function readCounter(image: string): Promise<number> {
  const { offset, copies } = COUNTER;
  const values = new Uint32Array(
    await Bun.file(image)
      .slice(offset, offset + copies * 4)
      .arrayBuffer(),
  );
  const first = values[0] ?? 0;
  const other = values.find((value) => value !== first);
  if (other !== undefined) throw new Error(`the copies of the counter differ: ${first} and ${other}`);
  return first;
}
