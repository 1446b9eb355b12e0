#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <linux/magic.h>

#include "retry.h"
#include "symbols.h"

using vhostd::orErrno;
using vhostd::retried;

// close is never repeated: after EINTR Linux has closed the fd already, and its number may be someone else's.
int32_t vhostd_close(int32_t fd) {
  int result = close(fd);
  return result < 0 && errno != EINTR ? -errno : 0;
}

// 3: a duplicate must never take the place of a standard stream.
int32_t vhostd_lock(int32_t fd) { return orErrno(flock(fd, LOCK_EX | LOCK_NB)); }

int32_t vhostd_dup(int32_t fd) { return orErrno(fcntl(fd, F_DUPFD_CLOEXEC, 3)); }

int32_t vhostd_eventfd() { return orErrno(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)); }

/** Does not rely on O_NONBLOCK: whoever shares the open file can take the flag away, and the counter too. */
int64_t vhostd_drain_eventfd(int32_t fd) {
  uint64_t count = 0;
  iovec part = {&count, sizeof count};
  ssize_t result = retried([&] { return preadv2(fd, &part, 1, -1, RWF_NOWAIT); });
  if (result == -EOPNOTSUPP) {
    // Linux before 5.8 knows no better.
    pollfd ready = {fd, POLLIN, 0};
    if (poll(&ready, 1, 0) <= 0 || !(ready.revents & POLLIN)) return 0;
    result = retried([&] { return read(fd, &count, sizeof count); });
  }
  if (result == -EAGAIN) return 0;
  if (result < 0) return result;
  return count > INT64_MAX ? INT64_MAX : static_cast<int64_t>(count);
}

int32_t vhostd_truncate(int32_t fd, int64_t size) {
  return retried([&] { return ftruncate(fd, size); });
}

int32_t vhostd_memfd(const char* name, int64_t size) {
  int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return -errno;
  int32_t result = vhostd_truncate(fd, size);
  if (result < 0) {
    close(fd);
    return result;
  }
  return fd;
}

int32_t vhostd_seal_size(int32_t fd) {
  return retried([&] { return fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL); });
}

int32_t vhostd_open(const char* path, int32_t writable) {
  return retried([&] { return open(path, (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC | O_NOCTTY); });
}

int64_t vhostd_pread(int32_t fd, uint8_t* into, int64_t length, int64_t offset) {
  return retried([&] { return pread(fd, into, static_cast<size_t>(length), offset); });
}

int64_t vhostd_pwrite(int32_t fd, const uint8_t* from, int64_t length, int64_t offset) {
  return retried([&] { return pwrite(fd, from, static_cast<size_t>(length), offset); });
}

namespace {

enum Kind : int64_t { REGULAR, EVENTFD, SOCKET, OTHER_KIND };
enum Filesystem : int64_t { TMPFS, HUGETLBFS, OTHER_FILESYSTEM };

bool isEventfd(int fd) {
  char link[64];
  char target[32];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, target, sizeof target);
  static const char name[] = "anon_inode:[eventfd]";
  return length == sizeof name - 1 && memcmp(target, name, sizeof name - 1) == 0;
}

}  // namespace

/**
 * info: dev, ino, size, Kind, Filesystem, page size.
 *
 * The file may lie on a filesystem that a hostile process serves (FUSE), where fstat and fstatfs wait for that process
 * as long as it likes. Therefore: seals exist on tmpfs and hugetlbfs only and asking for them never leaves the kernel's
 * memory; any other file is asked for what the kernel has cached.
 */
int32_t vhostd_file_info(int32_t fd, int64_t* info) {
  bool inMemory = fcntl(fd, F_GET_SEALS) >= 0;
  struct statx status;
  if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_BASIC_STATS, &status) < 0) return -errno;
  info[0] = static_cast<int64_t>(makedev(status.stx_dev_major, status.stx_dev_minor));
  info[1] = static_cast<int64_t>(status.stx_ino);
  info[2] = static_cast<int64_t>(status.stx_size);
  info[3] = S_ISREG(status.stx_mode) ? REGULAR : S_ISSOCK(status.stx_mode) ? SOCKET : isEventfd(fd) ? EVENTFD : OTHER_KIND;
  info[4] = OTHER_FILESYSTEM;
  info[5] = sysconf(_SC_PAGESIZE);
  info[6] = static_cast<int64_t>(status.stx_blocks) * 512;
  if (!inMemory) return 0;
  struct statfs filesystem;
  if (fstatfs(fd, &filesystem) < 0) return -errno;
  if (filesystem.f_type == TMPFS_MAGIC) info[4] = TMPFS;
  if (filesystem.f_type == HUGETLBFS_MAGIC) {
    info[4] = HUGETLBFS;
    info[5] = filesystem.f_bsize;
  }
  return 0;
}

int32_t vhostd_ioctl(int32_t fd, int64_t request, uint8_t* argument) {
  int result = ioctl(fd, static_cast<unsigned long>(request), argument);
  return result < 0 ? -errno : result;
}

int64_t vhostd_raise_open_file_limit() {
  struct rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) < 0) return -errno;
  limit.rlim_cur = limit.rlim_max;
  if (setrlimit(RLIMIT_NOFILE, &limit) < 0) return -errno;
  return limit.rlim_cur > INT_MAX ? INT_MAX : static_cast<int64_t>(limit.rlim_cur);
}
