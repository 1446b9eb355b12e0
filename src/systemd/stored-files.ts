import { duplicate, type OwnedFd } from "../native/fd.ts";
import { compareFiles } from "../native/file-order.ts";

/** An open file that the service manager stores, or is about to. */
export interface StoredFile {
  readonly id: number;
  /** A duplicate, by which the file is recognized. */
  readonly fd: OwnedFd;
  /** How often records name it. */
  uses: number;
  state: "new" | "stored";
}

/** Open files, each once, whatever fds there are of it: found by what is open and not by a number. */
export class StoredFiles implements Disposable {
  /** In the order of compareFiles(). */
  private readonly sorted: StoredFile[] = [];
  private readonly idle = new Set<StoredFile>();

  /** How many the service manager stores. */
  get stored(): number {
    return this.sorted.filter(({ state }) => state === "stored").length;
  }

  /** Those that no record names. */
  get unused(): readonly StoredFile[] {
    return [...this.idle];
  }

  /** Counts a use of the file that `fd` is of. @param makeId for a file that is not there. @throws SystemError */
  use(fd: number, makeId: () => number): StoredFile {
    const { place, found } = this.find(fd);
    const file = found ?? this.insert(place, { id: makeId(), fd: duplicate(fd), uses: 0, state: "new" });
    this.useAgain(file);
    return file;
  }

  useAgain(file: StoredFile): void {
    file.uses++;
    this.idle.delete(file);
  }

  /** Takes back a use. */
  release(file: StoredFile): void {
    file.uses--;
    if (file.uses === 0) this.idle.add(file);
  }

  /** One that the service manager had stored; nothing uses it yet. Takes the fd. @throws SystemError */
  adopt(id: number, fd: OwnedFd): StoredFile {
    const file = this.insert(this.find(fd.number).place, { id, fd, uses: 0, state: "stored" });
    this.idle.add(file);
    return file;
  }

  /** Closes it here. */
  remove(file: StoredFile): void {
    this.idle.delete(file);
    this.sorted.splice(this.sorted.indexOf(file), 1);
    file.fd[Symbol.dispose]();
  }

  [Symbol.dispose](): void {
    for (const { fd } of this.sorted.splice(0)) fd[Symbol.dispose]();
    this.idle.clear();
  }

  private insert(place: number, file: StoredFile): StoredFile {
    this.sorted.splice(place, 0, file);
    return file;
  }

  private find(fd: number): { readonly place: number; readonly found?: StoredFile } {
    let low = 0;
    let high = this.sorted.length;
    while (low < high) {
      const middle = (low + high) >>> 1;
      const file = this.sorted[middle]!;
      const order = compareFiles(fd, file.fd.number);
      if (order === 0) return { place: middle, found: file };
      if (order < 0) high = middle;
      else low = middle + 1;
    }
    return { place: low };
  }
}
