#pragma once

#include <stdint.h>

#include <mutex>
#include <unordered_map>
#include <vector>

#include "epoll-thread.h"

namespace vhostd {

/**
 * One epoll thread that reports which watches are ready. A watch reports once and is then silent until rearmed.
 *
 * A watch has an fd of its own (a duplicate), so the number that was given may be closed and reused at any time. Its
 * token is never used again: a report that was under way when the watch was removed names nobody.
 */
class Poller {
 public:
  /** `wake(context)` is called on the thread when take() has something; not again before take() was called. */
  Poller(void (*wake)(void*), void* context) : wake(wake), context(context) {}
  ~Poller() { stop(); }
  Poller(const Poller&) = delete;
  Poller& operator=(const Poller&) = delete;

  /** 0 or -errno. Nothing when it runs already. */
  int start();
  /** Removes all watches and ends the thread. May be started again. */
  void stop();

  /** The token (> 0) of a new, armed watch for EPOLLIN or EPOLLOUT, or -errno. Hang-up and error report too. */
  int64_t add(int fd, uint32_t events);
  /** 0 or -errno; -ENOENT after removal. */
  int rearm(uint64_t token);
  void remove(uint64_t token);
  /** Tokens reported since the last call. May name watches that have been removed meanwhile. */
  std::vector<uint64_t> take();

 private:
  struct Watch {
    int fd;
    uint32_t events;
  };
  static void* run(void* self);
  void loop();

  void (*const wake)(void*);
  void* const context;
  EpollThread thread;
  std::mutex mutex;
  std::unordered_map<uint64_t, Watch> watches;
  std::vector<uint64_t> reported;
  bool woken = false;
  uint64_t lastToken = 0;
};

}  // namespace vhostd
