import { checkFd } from "./arguments.ts";
import { c, check } from "./load.ts";

/** By what kcmp(2) answers. */
const ORDERS = [0, -1, 1] as const;

/**
 * Whether two fds are of the same open file (0), and otherwise an order of the two files (-1, 1), which stays as long as
 * both are open and means nothing else.
 * @throws SystemError ENOSYS where the kernel has no kcmp
 */
export function compareFiles(one: number, other: number): -1 | 0 | 1 {
  return ORDERS[check(c.vhostd_compare_files(checkFd(one), checkFd(other)), "kcmp") as 0 | 1 | 2];
}
