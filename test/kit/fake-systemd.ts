import { dlopen } from "bun:ffi";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { CloseLane, OwnedFd } from "../../src/native/fd.ts";
import { compareFiles } from "../../src/native/file-order.ts";
import { c, check } from "../../src/native/load.ts";
import { type Watch, watch } from "../../src/native/poller.ts";

const libc = dlopen("libc.so.6", {
  socket: { args: ["i32", "i32", "i32"], returns: "i32" },
  bind: { args: ["i32", "ptr", "u32"], returns: "i32" },
}).symbols;
const AF_UNIX = 1;
const SOCK_DGRAM = 2;
const SOCK_CLOEXEC = 0o2000000;
const EAGAIN = 11;
/** Bytes of a message that are read. */
const MESSAGE_MAX = 4096;
/** What systemd takes for a name; others are called "stored". */
const VALID_NAME = /^[ -9;-~]{0,255}$/;

let abstractNames = 0;

export interface FakeSystemdOptions {
  /** FileDescriptorStoreMax=; 100. */
  readonly max?: number;
  /** Its socket is a path, or a name in the abstract namespace. */
  readonly place?: "path" | "abstract";
}

/**
 * The service manager's side of sd_notify(3) with an fd store, as systemd has it: it answers nothing, closes without a word
 * what exceeds its maximum and what is the same open file as one that it stores, and removes by name.
 */
export class FakeSystemd implements Disposable {
  readonly address: string;
  /** In the order in which they came. */
  readonly stored: { readonly name: string; readonly fd: OwnedFd }[] = [];
  /** Messages that are not about the fd store, as they came. */
  readonly notified: string[] = [];
  /** Names of the messages about the fd store, in their order: "+name", "-name", "barrier". */
  readonly journal: string[] = [];
  /** Fds that it closed because there was no room, or because it has the file. */
  refused = 0;
  /** Does not handle the messages that begin so. */
  deafTo: string | undefined;
  private left = Number.POSITIVE_INFINITY;
  /** Messages that are received from now on. */
  private allowed = Number.POSITIVE_INFINITY;
  private readonly stack = new DisposableStack();
  private readonly socket: OwnedFd;
  private readonly readable: Watch;
  private readonly max: number;

  constructor({ max = 100, place = "path" }: FakeSystemdOptions = {}) {
    this.max = max;
    using undo = new DisposableStack();
    if (place === "abstract") this.address = `@vhostd-test-${process.pid}-${abstractNames++}`;
    else {
      const directory = mkdtempSync(join(tmpdir(), "systemd-"));
      undo.defer(() => rmSync(directory, { recursive: true }));
      this.address = join(directory, "notify");
    }
    this.socket = undo.use(new OwnedFd(libc.socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0)));
    const name = Buffer.from(place === "abstract" ? this.address.replace("@", "\0") : `${this.address}\0`);
    const bytes = Buffer.concat([Buffer.from([AF_UNIX, 0]), name]);
    if (libc.bind(this.socket.number, bytes, bytes.length) !== 0) throw new Error(`bind to ${this.address} failed`);
    this.readable = undo.use(watch(this.socket.number, "in", () => this.receive()));
    this.readable.unref();
    this.stack.use(undo.move());
  }

  get names(): string[] {
    return this.stored.map(({ name }) => name);
  }

  /** Only so many more messages about the fd store come into effect, as if the sender had died then. Undefined: all do. */
  dieAfter(messages = Number.POSITIVE_INFINITY): void {
    this.left = messages;
  }

  /** Until it goes on, messages stay in the socket. */
  pause(): void {
    this.allowed = 0;
  }

  /** Handles one message while it is paused. */
  step(): void {
    this.allowed = 1;
    this.receive();
  }

  resume(): void {
    this.allowed = Number.POSITIVE_INFINITY;
    this.receive();
  }

  /** What the environment of the next process says, but for $LISTEN_PID. */
  get environment(): Record<string, string> {
    return {
      NOTIFY_SOCKET: this.address,
      FDSTORE: `${this.max}`,
      ...(this.stored.length === 0
        ? {}
        : { LISTEN_FDS: `${this.stored.length}`, LISTEN_FDNAMES: this.names.join(":") }),
    };
  }

  [Symbol.dispose](): void {
    for (const { fd } of this.stored.splice(0)) fd[Symbol.dispose]();
    this.stack[Symbol.dispose]();
  }

  private receive(): void {
    const bytes = new Uint8Array(MESSAGE_MAX);
    const fds = new Int32Array(253);
    const count = new Int32Array(1);
    while (this.allowed > 0) {
      const size = Number(c.vhostd_receive(this.socket.number, bytes, bytes.length, fds, count));
      if (size === -EAGAIN) break;
      check(size, "receive a notification");
      this.allowed--;
      const lane = new CloseLane();
      const received = Array.from(fds.subarray(0, count[0]), (fd) => new OwnedFd(fd, lane));
      const message = Buffer.from(bytes.subarray(0, size)).toString();
      if (this.deafTo === undefined || !message.startsWith(this.deafTo)) this.handle(message, received);
      for (const fd of received) fd[Symbol.dispose]();
    }
    this.readable.rearm();
  }

  /** Takes out of `fds` those that it stores. */
  private handle(message: string, fds: OwnedFd[]): void {
    const fields = message.split("\n");
    const asked = fields.find((field) => field.startsWith("FDNAME="))?.slice("FDNAME=".length);
    const name = asked !== undefined && VALID_NAME.test(asked) ? asked : "stored";
    if (fields.includes("BARRIER=1")) {
      if (fields.length === 1 && fds.length === 1) this.journal.push("barrier");
    } else if (fields.includes("FDSTORE=1")) {
      if (!fields.includes("FDPOLL=0")) throw new Error(`${message} lets the fd be dropped when its peer hangs up`);
      this.journal.push(`+${name}`);
      if (this.left-- <= 0) return;
      for (const fd of fds.splice(0)) this.store(name, fd);
    } else if (fields.includes("FDSTOREREMOVE=1")) {
      this.journal.push(`-${name}`);
      if (this.left-- <= 0) return;
      for (const entry of this.stored.filter((each) => each.name === asked)) {
        entry.fd[Symbol.dispose]();
        this.stored.splice(this.stored.indexOf(entry), 1);
      }
    } else this.notified.push(message);
  }

  private store(name: string, fd: OwnedFd): void {
    const isThere = this.stored.some((entry) => compareFiles(entry.fd.number, fd.number) === 0);
    if (isThere || this.stored.length >= this.max) {
      this.refused++;
      fd[Symbol.dispose]();
    } else this.stored.push({ name, fd });
  }
}
