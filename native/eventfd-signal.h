#pragma once

#include <linux/aio_abi.h>

namespace vhostd {

/**
 * Adds 1 to an eventfd and never blocks, whoever else holds it.
 *
 * write() on a peer's eventfd can block for ever: the peer fills the counter and clears O_NONBLOCK, which belongs to
 * the open file that is shared with it; asking first (poll, F_GETFL) leaves a gap in which it does so. The kernel's
 * own way to signal an eventfd has no such wait, and Linux AIO lets a program ask for it: a request with
 * IOCB_FLAG_RESFD signals that eventfd when it completes. Reading nothing from a file of our own completes at once,
 * inside io_submit. Where AIO is refused (some containers), a write that poll() announced is the best there is.
 *
 * Not for use by two threads at a time.
 */
class EventfdSignal {
 public:
  EventfdSignal();
  ~EventfdSignal();
  EventfdSignal(const EventfdSignal&) = delete;
  EventfdSignal& operator=(const EventfdSignal&) = delete;

  /** 0 or -errno; -EINVAL where `fd` is not an eventfd. */
  int signal(int fd);
  /** Whether the kernel's way is used, not the fallback. */
  bool isExact() const { return context != 0; }
  /** The fallback. A counter that is full is left alone: its signal waits already. */
  static int signalByWrite(int fd);

 private:
  void reap();

  aio_context_t context = 0;
  int file = -1;
  /** Requests completed whose results still lie in the kernel's ring. */
  unsigned unreaped = 0;
};

}  // namespace vhostd
