#pragma once

#include <linux/io_uring.h>
#include <stddef.h>
#include <stdint.h>

namespace vhostd {

/**
 * An io_uring (io_uring(7)): requests are written with next() and handed over by submit(); their results lie in a ring
 * that is emptied by take() or discard(). One thread uses it, the one whose system calls do the kernel's work of it.
 */
class IoRing {
 public:
  IoRing() = default;
  ~IoRing() { close(); }
  IoRing(const IoRing&) = delete;
  IoRing& operator=(const IoRing&) = delete;

  /**
   * 0 or -errno; -ENOSYS before Linux 6.15, where a thread that waits here would count as one that waits for a disk.
   * Both numbers are powers of two.
   */
  int open(unsigned requests, unsigned results);
  /** Requests that are under way are cancelled, at some time. */
  void close();
  bool isOpen() const { return fd >= 0; }
  int descriptor() const { return fd; }

  /** 0 or -errno. The eventfd is signalled, never written to, with each result; -1: none any more. */
  int signalWithResults(int eventfd);

  /** An empty request. There is room for as many as open() was told, until submit(). */
  io_uring_sqe& next(uint8_t operation, int target, uint64_t token);
  /** Hands the requests over and waits for so many results. How many were handed over, or -errno. */
  int submit(unsigned wait);
  /** Each result, once. */
  template <typename Use>
  void take(Use use) {
    unsigned at = *resultsHead;
    const unsigned end = __atomic_load_n(resultsTail, __ATOMIC_ACQUIRE);
    while (at != end) {
      const io_uring_cqe result = results[at++ & resultsMask];
      __atomic_store_n(resultsHead, at, __ATOMIC_RELEASE);
      use(result);
    }
  }
  /** Empties the ring of results, also of those that it had no room for. */
  void discard();

 private:
  int enter(unsigned submitted, unsigned wait, unsigned flags);

  int fd = -1;
  char* rings = nullptr;
  size_t ringsSize = 0;
  io_uring_sqe* requests = nullptr;
  size_t requestsSize = 0;
  unsigned pending = 0;
  unsigned requestsMask = 0;
  unsigned resultsMask = 0;
  unsigned* requestsTail = nullptr;
  unsigned* requestsFlags = nullptr;
  unsigned* resultsHead = nullptr;
  unsigned* resultsTail = nullptr;
  io_uring_cqe* results = nullptr;
};

}  // namespace vhostd
