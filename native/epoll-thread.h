#pragma once

#include <pthread.h>
#include <stdint.h>
#include <sys/epoll.h>

namespace vhostd {

/** A thread that sleeps in epoll_wait, and the eventfd that ends it. What the events mean is its user's business. */
class EpollThread {
 public:
  /** The token that says: end. Users number theirs from 1. */
  static constexpr uint64_t STOP = 0;

  EpollThread() = default;
  EpollThread(const EpollThread&) = delete;
  EpollThread& operator=(const EpollThread&) = delete;

  /** 0 or -errno. Nothing when it runs already. `run` returns when wait() has given STOP. */
  int start(void* (*run)(void*), void* argument);
  /** Sends STOP and waits for the thread; nothing is watched afterwards. May be started again. */
  void stop();
  bool running() const { return epoll >= 0; }

  /** A duplicate of `fd` that is watched for `events`, or -errno. The file is watched until drop() is given it. */
  int watch(int fd, uint32_t events, uint64_t token);
  /** 0 or -errno. */
  int change(int own, uint32_t events, uint64_t token);
  void drop(int own);

  /** On the thread: the number of events, or less than 0. */
  int wait(epoll_event* events, int most) { return epoll_wait(epoll, events, most, -1); }

 private:
  int control(int operation, int fd, uint32_t events, uint64_t token);

  pthread_t thread;
  int epoll = -1;
  int stopFd = -1;
};

}  // namespace vhostd
