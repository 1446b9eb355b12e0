import { dlopen } from "bun:ffi";
import { OwnedFd } from "../../../src/native/fd.ts";

const libc = dlopen("libc.so.6", {
  eventfd: { args: ["u32", "i32"], returns: "i32" },
  write: { args: ["i32", "ptr", "u64"], returns: "i64" },
});

/** A hostile peer's eventfd: blocking, and its counter as high as it goes. A write to it never returns. */
export function fullEventfd(): OwnedFd {
  const fd = new OwnedFd(libc.symbols.eventfd(0, 0));
  const count = new BigUint64Array([2n ** 64n - 2n]);
  if (libc.symbols.write(fd.number, count, 8) !== 8n) throw new Error("the eventfd could not be filled");
  return fd;
}
