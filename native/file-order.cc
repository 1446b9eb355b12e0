#include <errno.h>
#include <linux/kcmp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "retry.h"
#include "symbols.h"

/**
 * How two open files of this process are ordered: 0 for fds of the same one, 1 and 2 for one before and after the other.
 * The order has no meaning and stays as long as both are open (kcmp(2)).
 */
int32_t vhostd_compare_files(int32_t one, int32_t other) {
  pid_t self = getpid();
  return static_cast<int32_t>(vhostd::orErrno(syscall(SYS_kcmp, self, self, KCMP_FILE, one, other)));
}
