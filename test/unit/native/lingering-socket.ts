import { dlopen } from "bun:ffi";
import { OwnedFd } from "../../../src/native/fd.ts";

const libc = dlopen("libc.so.6", {
  socket: { args: ["i32", "i32", "i32"], returns: "i32" },
  bind: { args: ["i32", "ptr", "u32"], returns: "i32" },
  listen: { args: ["i32", "i32"], returns: "i32" },
  getsockname: { args: ["i32", "ptr", "ptr"], returns: "i32" },
  connect: { args: ["i32", "ptr", "u32"], returns: "i32" },
  accept: { args: ["i32", "ptr", "ptr"], returns: "i32" },
  setsockopt: { args: ["i32", "i32", "i32", "ptr", "u32"], returns: "i32" },
  send: { args: ["i32", "ptr", "u64", "i32"], returns: "i64" },
}).symbols;

const AF_INET = 2;
const SOCK_STREAM_CLOEXEC = 0o2000001;
const SOL_SOCKET = 1;
const SO_RCVBUF = 8;
const SO_LINGER = 13;
const MSG_DONTWAIT = 0x40;
/** Seconds: more than any test lasts, so that a close that is waited for is seen. */
const LINGER = 30;

/**
 * A hostile peer's socket: the close of its last fd does not return before `release` or the end of the linger time,
 * because data was not read at the other end.
 */
export class LingeringSocket implements Disposable {
  readonly fd: OwnedFd;
  private readonly others: readonly OwnedFd[];

  constructor() {
    const listener = new OwnedFd(libc.socket(AF_INET, SOCK_STREAM_CLOEXEC, 0));
    libc.setsockopt(listener.number, SOL_SOCKET, SO_RCVBUF, Int32Array.of(4096), 4);
    const address = Uint8Array.of(AF_INET, 0, 0, 0, 127, 0, 0, 1, ...new Uint8Array(8));
    libc.bind(listener.number, address, address.length);
    libc.listen(listener.number, 1);
    libc.getsockname(listener.number, address, Uint32Array.of(address.length));
    this.fd = new OwnedFd(libc.socket(AF_INET, SOCK_STREAM_CLOEXEC, 0));
    if (libc.connect(this.fd.number, address, address.length) !== 0) throw new Error("no TCP connection on loopback");
    this.others = [listener, new OwnedFd(libc.accept(listener.number, null, null))];
    const bytes = new Uint8Array(65536);
    while (libc.send(this.fd.number, bytes, bytes.length, MSG_DONTWAIT) > 0n);
    libc.setsockopt(this.fd.number, SOL_SOCKET, SO_LINGER, Int32Array.of(1, LINGER), 8);
  }

  /** A close that is under way ends. */
  release(): void {
    for (const other of this.others) other[Symbol.dispose]();
  }

  [Symbol.dispose](): void {
    this.release();
    this.fd[Symbol.dispose]();
  }
}
