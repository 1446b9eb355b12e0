/** One file of an initramfs. Directories are made as needed. */
export type ArchiveEntry =
  | { readonly kind: "file"; readonly content: Uint8Array; readonly executable?: boolean }
  | { readonly kind: "link"; readonly target: string }
  | { readonly kind: "directory" };

const MODE = { file: 0o100644, executable: 0o100755, link: 0o120777, directory: 0o040755 } as const;

/**
 * A cpio archive in the "newc" format that the kernel unpacks (Documentation/driver-api/early-userspace/buffer-format.rst).
 * @param entries by path without a leading slash
 */
export function cpioArchive(entries: ReadonlyMap<string, ArchiveEntry>): Uint8Array {
  const parts: Uint8Array[] = [];
  let inode = 0;
  for (const [path, entry] of withDirectories(entries)) parts.push(...member(path, entry, ++inode));
  parts.push(...record("TRAILER!!!", 0, 0, new Uint8Array()));
  return Buffer.concat(parts);
}

/** Every directory must stand before what is in it. */
function withDirectories(entries: ReadonlyMap<string, ArchiveEntry>): [string, ArchiveEntry][] {
  const all = new Map<string, ArchiveEntry>();
  for (const [path, entry] of entries) {
    const folders = path.split("/").slice(0, -1);
    for (let depth = 1; depth <= folders.length; depth++) {
      const folder = folders.slice(0, depth).join("/");
      if (!all.has(folder)) all.set(folder, { kind: "directory" });
    }
    all.set(path, entry);
  }
  return [...all];
}

function member(path: string, entry: ArchiveEntry, inode: number): Uint8Array[] {
  switch (entry.kind) {
    case "directory":
      return record(path, MODE.directory, inode, new Uint8Array());
    case "link":
      return record(path, MODE.link, inode, new TextEncoder().encode(entry.target));
    case "file":
      return record(path, entry.executable ? MODE.executable : MODE.file, inode, entry.content);
  }
}

/** Header, name and content, each padded to four bytes. Owner, times and device numbers are 0. */
function record(path: string, mode: number, inode: number, content: Uint8Array): Uint8Array[] {
  const name = new TextEncoder().encode(`${path}\0`);
  const fields = [inode, mode, 0, 0, 1, 0, content.length, 0, 0, 0, 0, name.length, 0];
  const header = `070701${fields.map((field) => field.toString(16).padStart(8, "0")).join("")}`;
  const head = Buffer.concat([new TextEncoder().encode(header), name]);
  return [head, padding(head.length), content, padding(content.length)];
}

function padding(length: number): Uint8Array {
  return new Uint8Array(-length & 3);
}
