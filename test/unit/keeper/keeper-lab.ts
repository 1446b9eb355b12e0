import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Deadline } from "../../../src/base/deadline.ts";
import { silentLogger } from "../../../src/base/log.ts";
import { KeeperClient } from "../../../src/keeper/keeper-client.ts";
import { KeeperServer } from "../../../src/keeper/keeper-server.ts";
import { HEADER, KEEPER_VERSION } from "../../../src/keeper/messages.ts";
import { Store, type StoreLimits } from "../../../src/keeper/store.ts";
import type { OwnedFd } from "../../../src/native/fd.ts";
import { MessageSocket } from "../../../src/native/message-socket.ts";
import { connectUnix, drainEventfd, eventfd, fileInfo, signalEventfd } from "../../../src/native/sys.ts";

export const soon = (time = 5_000) => Deadline.after(time, "the test");

/** A keeper in this process, and its clients. */
export class KeeperLab implements AsyncDisposable {
  private readonly stack = new AsyncDisposableStack();
  private server!: KeeperServer;
  private serve!: () => KeeperServer;

  private constructor(
    readonly path: string,
    readonly store: Store,
  ) {}

  static async create(limits?: StoreLimits): Promise<KeeperLab> {
    const directory = await mkdtemp(join(tmpdir(), "keeper-"));
    const lab = new KeeperLab(join(directory, "keeper.sock"), new Store(limits));
    lab.stack.defer(() => rm(directory, { recursive: true }));
    lab.stack.use(lab.store);
    const identity = { protocol: KEEPER_VERSION, version: "1.2.3", build: "today" };
    lab.serve = () => new KeeperServer(lab.store, { path: lab.path, identity, log: silentLogger, user: 0 });
    lab.server = lab.serve();
    lab.stack.defer(() => lab.server[Symbol.dispose]());
    return lab;
  }

  connect(deadline = soon()): Promise<KeeperClient> {
    return KeeperClient.connect(this.path, deadline);
  }

  /** On all clients; what is stored stays. */
  hangUp(): void {
    this.server[Symbol.dispose]();
    this.server = this.serve();
  }

  /** Somebody who says what he likes. */
  dial(): MessageSocket {
    const bodySize = (header: Uint8Array) => HEADER.read(header).bodySize;
    return new MessageSocket(connectUnix(this.path), { headerSize: HEADER.size, maxFds: 253, bodySize });
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.stack.disposeAsync();
  }
}

/** An eventfd that was signalled so often. */
export function signalled(times: number): OwnedFd {
  const fd = eventfd();
  for (let time = 0; time < times; time++) signalEventfd(fd.number);
  return fd;
}

/** What is stored: the record, and what its eventfds tell, by name. Signals are put back. */
export async function look(client: KeeperClient, key: string) {
  const stored = await client.get(key);
  if (stored === undefined) return undefined;
  const signals: Record<string, number> = {};
  for (const [name, owned] of stored.fds) {
    using fd = owned;
    if (fileInfo(fd.number).kind !== "eventfd") continue;
    signals[name] = drainEventfd(fd.number);
    for (let time = 0; time < signals[name]!; time++) signalEventfd(fd.number);
  }
  return { record: stored.record, signals };
}
