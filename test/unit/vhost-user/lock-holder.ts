import { dlopen } from "bun:ffi";
import { OwnedFd } from "../../../src/native/fd.ts";

const libc = dlopen("libc.so.6", {
  syscall: { args: ["i64", "i64"], returns: "i64" },
  ioctl: { args: ["i32", "u64", "ptr"], returns: "i32" },
  mmap: { args: ["u64", "u64", "i32", "i32", "i32", "i64"], returns: "u64" },
  recv: { args: ["i32", "u64", "u64", "i32"], returns: "i64" },
  alarm: { args: ["u32"], returns: "u32" },
}).symbols;

const SYS_USERFAULTFD = 323;
const O_CLOEXEC = 0o2000000;
const UFFD_API = 0xaan;
const UFFDIO_API = 0xc018aa3fn;
const UFFDIO_REGISTER = 0xc020aa00n;
const MODE_MISSING = 1n;
const PROT_READ_WRITE = 3;
const MAP_PRIVATE_ANONYMOUS = 0x22;
const MSG_PEEK = 2;
const PAGE = 4096n;
/** Seconds until this program ends by itself: nobody can end a process that waits for it. */
const LIFETIME = 20;
/** The fd of the socket. */
const SOCKET = 3;

/** An fd by which faults of this process, also those in the kernel, can be left unanswered; undefined where it may not. */
export function userfaultfd(): OwnedFd | undefined {
  const fd = Number(libc.syscall(SYS_USERFAULTFD, O_CLOEXEC));
  if (fd < 0) return undefined;
  const owned = new OwnedFd(fd);
  if (libc.ioctl(fd, UFFDIO_API, BigUint64Array.of(UFFD_API, 0n, 0n)) === 0) return owned;
  owned[Symbol.dispose]();
  return undefined;
}

/** Reads from a socket into memory whose fault nobody answers: the kernel's lock for readers of that socket is held. */
function holdLock(): void {
  libc.alarm(LIFETIME);
  const faults = userfaultfd();
  if (faults === undefined) throw new Error("userfaultfd cannot be had");
  const page = libc.mmap(0n, PAGE, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS, -1, 0n);
  const registered = libc.ioctl(faults.number, UFFDIO_REGISTER, BigUint64Array.of(page, PAGE, MODE_MISSING, 0n));
  if (registered !== 0) throw new Error("memory cannot be registered with userfaultfd");
  libc.recv(SOCKET, page, 1n, MSG_PEEK);
}

if (import.meta.main) holdLock();
