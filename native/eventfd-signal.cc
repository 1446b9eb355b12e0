#include "eventfd-signal.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <mutex>

#include "retry.h"
#include "symbols.h"

namespace vhostd {
namespace {

/** Results are collected once for so many signals: half the system calls. */
constexpr unsigned BATCH = 64;

}  // namespace

EventfdSignal::EventfdSignal() {
  file = memfd_create("eventfd-signal", MFD_CLOEXEC);
  if (file < 0) return;
  if (syscall(SYS_io_setup, BATCH, &context) < 0) context = 0;
}

EventfdSignal::~EventfdSignal() {
  if (context != 0) syscall(SYS_io_destroy, context);
  if (file >= 0) close(file);
}

int EventfdSignal::signal(int fd) {
  if (context == 0) return signalByWrite(fd);
  if (unreaped == BATCH) reap();
  static char nothing;
  iocb request;
  memset(&request, 0, sizeof request);
  request.aio_lio_opcode = IOCB_CMD_PREAD;
  request.aio_fildes = static_cast<uint32_t>(file);
  request.aio_buf = reinterpret_cast<uint64_t>(&nothing);
  request.aio_flags = IOCB_FLAG_RESFD;
  request.aio_resfd = static_cast<uint32_t>(fd);
  iocb* requests[] = {&request};
  long submitted = retried([&] { return syscall(SYS_io_submit, context, 1L, requests); });
  if (submitted == -EAGAIN) {
    reap();
    submitted = retried([&] { return syscall(SYS_io_submit, context, 1L, requests); });
  }
  if (submitted < 0) return static_cast<int>(submitted);
  unreaped++;
  return 0;
}

int EventfdSignal::signalByWrite(int fd) {
  pollfd ready = {fd, POLLOUT, 0};
  int result = retried([&] { return poll(&ready, 1, 0); });
  if (result < 0) return result;
  if (ready.revents & POLLNVAL) return -EBADF;
  if (!(ready.revents & POLLOUT)) return 0;
  const uint64_t one = 1;
  ssize_t written = retried([&] { return write(fd, &one, sizeof one); });
  return written < 0 && written != -EAGAIN ? static_cast<int>(written) : 0;
}

void EventfdSignal::reap() {
  io_event results[BATCH];
  timespec now = {0, 0};
  retried([&] { return syscall(SYS_io_getevents, context, 0L, static_cast<long>(BATCH), results, &now); });
  unreaped = 0;
}

}  // namespace vhostd

int32_t vhostd_signal_eventfd(int32_t fd) {
  static std::mutex one;
  static vhostd::EventfdSignal signal;
  std::lock_guard<std::mutex> lock(one);
  return signal.signal(fd);
}
