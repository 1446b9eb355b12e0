import { SystemError, VhostdError } from "../base/errors.ts";
import { checkFd, checkInteger, checkSize, cString } from "./arguments.ts";
import { CloseLane, OwnedFd } from "./fd.ts";
import { c, check } from "./load.ts";

/**
 * System calls, synchronous and quick. All throw SystemError, and VhostdError invalid for arguments that no system
 * call can mean.
 */

/** sockaddr_un has 108 bytes for a path and its end (unix(7)). */
const LONGEST_SOCKET_PATH = 107;
const ENAMETOOLONG = 36;
const EAGAIN = 11;
const ECONNABORTED = 103;

/** A new eventfd, counter 0, non-blocking. */
export function eventfd(): OwnedFd {
  return new OwnedFd(check(c.vhostd_eventfd(), "eventfd"));
}

/** Adds 1. Never blocks, also not on a peer's eventfd that is full and blocking (native/eventfd-signal.h says how). */
export function signalEventfd(fd: number): void {
  check(c.vhostd_signal_eventfd(checkFd(fd)), "signal eventfd");
}

/** Takes the counter, 0 when there is nothing. Never blocks, also where a peer shares the open file. */
export function drainEventfd(fd: number): number {
  return check(c.vhostd_drain_eventfd(checkFd(fd)), "read eventfd");
}

/** A new file in memory. @param size bytes */
export function memfd(name: string, size: number): OwnedFd {
  const result = c.vhostd_memfd(cString(name, "name of a memory file"), checkSize(size, "size of a memory file"));
  return new OwnedFd(check(result, `memfd_create ${name}`));
}

/**
 * From now on nobody can make a memory file of ours longer or shorter: neither fault whoever maps it, nor keep it busy
 * for longer than writing all of it takes.
 */
export function sealSize(fd: number): void {
  check(c.vhostd_seal_size(checkFd(fd)), "F_ADD_SEALS");
}

function socketPath(path: string): Uint8Array {
  const bytes = cString(path, "socket path");
  if (bytes.length - 1 > LONGEST_SOCKET_PATH) {
    const fix = `choose a socket path of at most ${LONGEST_SOCKET_PATH} bytes; this one has ${bytes.length - 1}`;
    throw new SystemError(`socket path ${path}`, ENAMETOOLONG, { fix });
  }
  return bytes;
}

/** A connected, non-blocking stream socket, or an error at once (ENOENT, ECONNREFUSED; EAGAIN: the queue is full). */
export function connectUnix(path: string, lane = new CloseLane()): OwnedFd {
  return new OwnedFd(check(c.vhostd_connect_unix(socketPath(path)), `connect to ${path}`), lane);
}

/**
 * A listening, non-blocking stream socket. A socket file that nobody listens on is replaced; EADDRINUSE where somebody
 * does, or where the file is no socket. The file stays when the socket is closed; `shutDown` it before.
 * @param mode permission bits of the socket file, independent of the umask
 */
export function listenUnix(path: string, mode: number): OwnedFd {
  const result = c.vhostd_listen_unix(socketPath(path), checkInteger(mode, 0, 0o777, "mode of a socket"));
  return new OwnedFd(check(result, `listen on ${path}`), new CloseLane());
}

/** On a socket at which another process has listened: those who connect from now on see that this one does. */
export function listenAgain(socket: number): void {
  check(c.vhostd_listen_again(checkFd(socket)), "listen");
}

/** A connection that waits on a listening socket, or undefined. */
export function accept(fd: number, lane = new CloseLane()): OwnedFd | undefined {
  const result = Number(c.vhostd_accept(checkFd(fd)));
  if (result === -EAGAIN || result === -ECONNABORTED) return undefined;
  return new OwnedFd(check(result, "accept"), lane);
}

/** Two connected, non-blocking stream sockets. */
export function socketPair(): [OwnedFd, OwnedFd] {
  const pair = new Int32Array(2);
  check(c.vhostd_socket_pair(pair), "socketpair");
  return [new OwnedFd(pair[0]!, new CloseLane()), new OwnedFd(pair[1]!, new CloseLane())];
}

/**
 * Ends a unix socket before its fd is closed, which may take a while: the peer reads the end of the stream, and nobody
 * connects any more. Duplicates of the fd end with it.
 */
export function shutDown(fd: number): void {
  // ENOTCONN: it has ended already.
  c.vhostd_shutdown(checkFd(fd));
}

/** The fd is a stream socket of the unix family: no other can be used without waiting for who shares its open file. */
export function isUnixStream(fd: number): boolean {
  return Number(c.vhostd_is_unix_stream(checkFd(fd))) === 1;
}

/** Whether bytes, or the end of the stream, wait to be read; undefined for what is no connected unix stream socket. */
export function isReadable(fd: number): boolean | undefined {
  if (!isUnixStream(fd)) return undefined;
  const unread = Number(c.vhostd_unread(checkFd(fd)));
  if (unread < 0) return undefined;
  return unread > 0 || check(c.vhostd_is_hung_up(checkFd(fd)), "poll") > 0;
}

/** The process at the other end of a unix socket, as it was when it connected. */
export function peerCredentials(fd: number): { pid: number; uid: number; gid: number } {
  const values = new Int32Array(3);
  check(c.vhostd_peer_credentials(checkFd(fd), values), "SO_PEERCRED");
  return { pid: values[0]!, uid: values[1]! >>> 0, gid: values[2]! >>> 0 };
}

// The order is that of native/files.cc.
const KINDS = ["regular", "eventfd", "socket", "other"] as const;
const FILESYSTEMS = ["tmpfs", "hugetlbfs", "other"] as const;

export interface FileInfo {
  /** With `ino` what tells files on tmpfs and hugetlbfs apart; those of other files may be rounded. */
  readonly dev: number;
  readonly ino: number;
  /** Bytes. Of a file that is neither on tmpfs nor on hugetlbfs: as the kernel remembers it. */
  readonly size: number;
  readonly kind: (typeof KINDS)[number];
  /** memfds are "tmpfs", or "hugetlbfs" when made of huge pages. */
  readonly filesystem: (typeof FILESYSTEMS)[number];
  /** Bytes: the unit in which the file can be mapped. */
  readonly pageSize: number;
  /** Bytes that it has memory for already. */
  readonly allocated: number;
}

/**
 * What a peer's fd is. Never waits for a filesystem that another process serves.
 * @throws SystemError; VhostdError notSupported for a memory file whose numbers exceed 2^53
 */
export function fileInfo(fd: number): FileInfo {
  const values = new BigInt64Array(7);
  check(c.vhostd_file_info(checkFd(fd), values), "fstat");
  const [dev, ino, size, kind, filesystem, pageSize, allocated] = Array.from(values, Number) as [
    number,
    number,
    number,
    0 | 1 | 2 | 3,
    0 | 1 | 2,
    number,
    number,
  ];
  const info = { dev, ino, size, kind: KINDS[kind], filesystem: FILESYSTEMS[filesystem], pageSize, allocated };
  // Two files of guest memory must never be taken for one.
  if (info.filesystem !== "other" && !(Number.isSafeInteger(ino) && Number.isSafeInteger(dev))) {
    throw new VhostdError("notSupported", `file has the inode number ${values[1]} on device ${values[0]}, beyond 2^53`);
  }
  return info;
}

/** Reads at `offset` (bytes); the count read is smaller at the end of the file. */
export function pread(fd: number, into: Uint8Array, offset: number): number {
  if (into.length === 0) return 0;
  return check(c.vhostd_pread(checkFd(fd), into, into.length, checkSize(offset, "offset")), "pread");
}

/** Writes at `offset` (bytes); the count written. */
export function pwrite(fd: number, from: Uint8Array, offset: number): number {
  if (from.length === 0) return 0;
  return check(c.vhostd_pwrite(checkFd(fd), from, from.length, checkSize(offset, "offset")), "pwrite");
}

export function openFile(path: string, access: "read" | "read-write"): OwnedFd {
  return new OwnedFd(check(c.vhostd_open(cString(path, "path"), access === "read-write" ? 1 : 0), `open ${path}`));
}

/**
 * Locks a directory for this process (flock(2)), until the fd is closed or the process ends, however it ends.
 * @returns undefined where another process has it
 */
export function lockDirectory(path: string): OwnedFd | undefined {
  using undo = new DisposableStack();
  const directory = undo.use(openFile(path, "read"));
  const result = Number(c.vhostd_lock(directory.number));
  if (result === -EAGAIN) return undefined;
  check(result, `flock ${path}`);
  undo.move();
  return directory;
}

/** @param size bytes */
export function truncate(fd: number, size: number): void {
  check(c.vhostd_truncate(checkFd(fd), checkSize(size, "size of a file")), "ftruncate");
}

/** Raises the limit of open files of this process as far as it may; returns the new one. */
export function raiseOpenFileLimit(): number {
  return check(c.vhostd_raise_open_file_limit(), "RLIMIT_NOFILE");
}
