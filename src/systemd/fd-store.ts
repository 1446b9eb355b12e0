import { Deadline } from "../base/deadline.ts";
import { asError, VhostdError } from "../base/errors.ts";
import type { Json } from "../base/json.ts";
import type { Logger } from "../base/log.ts";
import { OperationQueue } from "../base/operation-queue.ts";
import type { OwnedFd } from "../native/fd.ts";
import { isReadable } from "../native/sys.ts";
import { NotifySocket } from "./notify-socket.ts";
import { type StoredFile, StoredFiles } from "./stored-files.ts";
import { decodeRecord, encodeRecord, type RecordText, readRecord, writeRecord } from "./stored-record.ts";

/** Milliseconds. */
const PATIENCE = 5_000;
const NAME = /^vhostd-(file|record)-(\d{1,15})$/;
const fileName = (id: number) => `vhostd-file-${id}`;
const recordName = (id: number) => `vhostd-record-${id}`;

/** Whether the fd store has an fd by that name from here. */
export function isStoreName(name: string): boolean {
  return NAME.test(name);
}

export interface FdStoreOptions {
  /** Where notifications go. */
  readonly address: string;
  /** Fds that the service manager stores at most. */
  readonly max: number;
  readonly log: Logger;
  /** Milliseconds until it has done what it was asked for; 5 s. */
  readonly patience?: number;
}

interface Kept {
  readonly record: Json;
  /** Borrowed. */
  readonly fds: ReadonlyMap<string, number>;
}

/** A record that the service manager stores, or is about to. */
interface StoredRecord {
  readonly id: number;
  /** As it is stored. */
  readonly bytes: Uint8Array;
  readonly files: ReadonlyMap<string, StoredFile>;
}

/**
 * Records with fds in systemd's fd store, which hands them to the next process of the service. It says nothing to what it is
 * told, knows no transactions, and closes an fd of a file that it stores already. So each file is stored once, under
 * a number, and a record is a memory file that names them. What a record needs is stored before it, and what it replaces is
 * removed after it, so a process can die between any two messages: of the records of a key the one with the
 * highest number counts, and what nothing names is removed by the next process.
 *
 * Every file has a second fd here, to be recognized by.
 */
export class FdStore implements Disposable {
  private readonly operations = new OperationQueue();
  private readonly files = new StoredFiles();
  private readonly records = new Map<string, StoredRecord>();
  /** Names of records that the service manager still stores and that have no use any more. */
  private readonly obsolete = new Set<string>();
  private lastId = 0;

  private constructor(
    private readonly socket: NotifySocket,
    private readonly options: FdStoreOptions,
  ) {}

  /** For connectFdStore(). @param handed what the process before has stored; it is taken. @throws SystemError */
  static async open(options: FdStoreOptions, handed: ReadonlyMap<string, OwnedFd>): Promise<FdStore> {
    using unused = new DisposableStack();
    const fds = unused.adopt(new Map(handed), closeAll);
    using undo = new DisposableStack();
    const store = undo.use(new FdStore(new NotifySocket(options.address), options));
    store.adopt(fds);
    const deadline = store.deadline("tidying the fd store of systemd");
    await store.operations
      .run(() => store.sweep(deadline))
      .catch((error) => {
        options.log.warn("what is of no use any more stays in the fd store of systemd for now", asError(error));
      });
    undo.move();
    return store;
  }

  /**
   * Resolves when the service manager has handled it.
   * @throws VhostdError keeperStore where there is no room, and what was stored before stays; timedOut, SystemError
   */
  async put(key: string, take: () => Kept): Promise<void> {
    const deadline = this.deadline(`storing ${key} in the fd store of systemd`);
    const { record, fds } = take();
    // At once: they are another's.
    const stored = this.describe(key, record, fds);
    await this.run(deadline, async () => {
      try {
        await this.store(key, stored, deadline);
      } catch (error) {
        this.release(stored.files);
        throw error;
      }
      this.forget(key);
      this.records.set(key, stored);
    });
  }

  /** The fds are the caller's. */
  async get(key: string): Promise<{ record: Json; fds: Map<string, OwnedFd> } | undefined> {
    const stored = this.records.get(key);
    if (stored === undefined) return undefined;
    using undo = new DisposableStack();
    const fds = undo.adopt(new Map<string, OwnedFd>(), closeAll);
    for (const [name, { fd }] of stored.files) fds.set(name, fd.dup());
    undo.move();
    return { record: decodeRecord(stored.bytes).record, fds };
  }

  async list(): Promise<string[]> {
    return [...this.records.keys()];
  }

  /** @throws as put() does; what there was is of no use from now on all the same */
  async delete(key: string): Promise<void> {
    const deadline = this.deadline(`removing ${key} from the fd store of systemd`);
    await this.run(deadline, async () => this.forget(key));
  }

  /**
   * Whether something waits to be read from sockets of stored records; undefined for what is no such socket.
   * @param places key of the record, and which of its fds, as they were stored
   */
  async readable(places: readonly (readonly [key: string, fd: number])[]): Promise<(boolean | undefined)[]> {
    return places.map(([key, place]) => {
      const file = [...(this.records.get(key)?.files.values() ?? [])][place];
      return file === undefined ? undefined : isReadable(file.fd.number);
    });
  }

  /** The service manager keeps what it stores. */
  [Symbol.dispose](): void {
    this.files[Symbol.dispose]();
    this.records.clear();
    this.socket[Symbol.dispose]();
  }

  /** Does `change`, and has removed what is of no use after it; waits until the service manager has handled all. */
  private async run(deadline: Deadline, change: () => Promise<void>): Promise<void> {
    const { passed } = await this.operations.run(async () => {
      try {
        await change();
      } finally {
        await this.sweep(deadline);
      }
      return this.socket.sendBarrier(deadline);
    });
    await passed;
  }

  private describe(key: string, record: Json, fds: ReadonlyMap<string, number>): StoredRecord {
    const files = new Map<string, StoredFile>();
    try {
      for (const [name, fd] of fds) files.set(name, this.useFile(fd));
      const ids = [...files].map(([name, { id }]) => [name, id] as const);
      return { id: this.nextId(), bytes: encodeRecord({ key, fds: ids, record }), files };
    } catch (error) {
      this.release(files);
      throw error;
    }
  }

  private useFile(fd: number): StoredFile {
    return this.files.use(fd, () => this.nextId());
  }

  private async store(key: string, { id, bytes, files }: StoredRecord, deadline: Deadline): Promise<void> {
    this.checkRoom(key, files);
    using record = writeRecord(key, bytes);
    for (const file of files.values()) {
      if (file.state === "stored") continue;
      await this.add(fileName(file.id), file.fd.number, deadline);
      file.state = "stored";
    }
    await this.add(recordName(id), record.number, deadline);
  }

  /** More than its maximum the service manager closes without a word. */
  private checkRoom(key: string, files: StoredRecord["files"]): void {
    const more = new Set([...files.values()].filter(({ state }) => state === "new")).size;
    const before = this.files.stored + this.records.size + this.obsolete.size;
    const count = before + more + 1;
    if (count <= this.options.max) return;
    const limit = `${count}, at most ${this.options.max}`;
    throw new VhostdError("keeperStore", `fds in the fd store of systemd with ${key}: ${limit}`, {
      fix: "raise FileDescriptorStoreMax= of the service",
    });
  }

  private add(name: string, fd: number, deadline: Deadline): Promise<void> {
    // Polled, it would be dropped as soon as its peer hangs up.
    return this.socket.send(["FDSTORE=1", `FDNAME=${name}`, "FDPOLL=0"], [fd], deadline);
  }

  /** There is no such record from now on. */
  private forget(key: string): void {
    const stored = this.records.get(key);
    if (stored === undefined) return;
    this.records.delete(key);
    this.obsolete.add(recordName(stored.id));
    this.release(stored.files);
  }

  private release(files: StoredRecord["files"]): void {
    for (const file of files.values()) this.files.release(file);
  }

  /** Removes what is of no use any more: records first, so that none is found without its files. */
  private async sweep(deadline: Deadline): Promise<void> {
    for (const name of [...this.obsolete]) {
      await this.removeByName(name, deadline);
      this.obsolete.delete(name);
    }
    for (const file of this.files.unused) {
      if (file.state === "stored") await this.removeByName(fileName(file.id), deadline);
      // It may have found a user meanwhile, who will store it again.
      if (file.uses === 0) this.files.remove(file);
      else file.state = "new";
    }
  }

  private removeByName(name: string, deadline: Deadline): Promise<void> {
    return this.socket.send(["FDSTOREREMOVE=1", `FDNAME=${name}`], [], deadline);
  }

  /** What the process before has left. The fds of files are taken out of the map. */
  private adopt(handed: Map<string, OwnedFd>): void {
    const files = new Map<number, StoredFile>();
    const records: { id: number; bytes: Uint8Array; content: RecordText }[] = [];
    for (const [name, fd] of [...handed]) {
      const [, kind, number] = NAME.exec(name) ?? [];
      const id = Number(number);
      this.lastId = Math.max(this.lastId, id);
      if (kind === "file") {
        files.set(id, this.files.adopt(id, fd));
        handed.delete(name);
        continue;
      }
      try {
        const bytes = readRecord(fd.number);
        records.push({ id, bytes, content: decodeRecord(bytes) });
      } catch (error) {
        this.options.log.warn("a record in the fd store of systemd is dropped", asError(error));
        this.obsolete.add(name);
      }
    }
    records.sort((one, other) => other.id - one.id);
    for (const { id, bytes, content } of records) {
      const { key, fds } = content;
      const missing = fds.filter(([, file]) => !files.has(file)).length;
      if (missing > 0) this.options.log.warn(`a record of ${key} is dropped: ${missing} of its fds are not stored`);
      if (missing > 0 || this.records.has(key)) {
        this.obsolete.add(recordName(id));
        continue;
      }
      const named = new Map(fds.map(([name, file]) => [name, files.get(file)!] as const));
      for (const file of named.values()) this.files.useAgain(file);
      this.records.set(key, { id, bytes, files: named });
    }
  }

  private deadline(what: string): Deadline {
    return Deadline.after(this.options.patience ?? PATIENCE, what);
  }

  private nextId(): number {
    this.lastId++;
    return this.lastId;
  }
}

export function closeAll(fds: ReadonlyMap<string, OwnedFd>): void {
  for (const fd of fds.values()) fd[Symbol.dispose]();
}
