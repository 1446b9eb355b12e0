#include <errno.h>
#include <fcntl.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "eventfd-signal.h"
#include "symbols.h"
#include "test/check.h"

TEST(signal_counts) {
  vhostd::EventfdSignal signal;
  int fd = vhostd_eventfd();
  // More than one batch of results.
  for (int round = 0; round < 1000; round++) CHECK(signal.signal(fd) == 0);
  CHECK(vhostd_drain_eventfd(fd) == 1000);
  CHECK(vhostd_drain_eventfd(fd) == 0);
  close(fd);
}

TEST(signal_of_a_full_blocking_eventfd_returns) {
  vhostd::EventfdSignal signal;
  int fd = eventfd(0, EFD_CLOEXEC);
  CHECK(eventfd_write(fd, UINT64_MAX - 1) == 0);
  alarm(10);
  for (int round = 0; round < 3; round++) {
    CHECK(vhostd::EventfdSignal::signalByWrite(fd) == 0);
    CHECK(signal.signal(fd) == 0);
  }
  alarm(0);
  uint64_t count = 0;
  CHECK(read(fd, &count, sizeof count) == sizeof count);
  // Only the kernel's own way goes beyond what a write may add.
  CHECK(count == (signal.isExact() ? UINT64_MAX : UINT64_MAX - 1));
  CHECK(vhostd::EventfdSignal::signalByWrite(fd) == 0);
  CHECK(vhostd_drain_eventfd(fd) == 1);
  close(fd);
}

TEST(signal_refuses_what_is_no_eventfd) {
  vhostd::EventfdSignal signal;
  int fd = vhostd_memfd("no eventfd", 0);
  int result = signal.signal(fd);
  CHECK(result < 0 || !signal.isExact());
  CHECK(signal.signal(1 << 20) == -EBADF);
  CHECK(vhostd::EventfdSignal::signalByWrite(1 << 20) == -EBADF);
  close(fd);
}

TEST(drain_of_an_empty_blocking_eventfd_returns) {
  int fd = eventfd(0, EFD_CLOEXEC);
  alarm(10);
  CHECK(vhostd_drain_eventfd(fd) == 0);
  CHECK(eventfd_write(fd, 3) == 0);
  CHECK(vhostd_drain_eventfd(fd) == 3);
  alarm(0);
  close(fd);
}
