#pragma once

#include <pthread.h>
#include <stdint.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <unordered_map>

namespace vhostd {

/**
 * Closes files that another process had a hand in. Such a close can take as long as that process likes: a TCP socket
 * that lingers, a file of a FUSE server, a unix socket in which such files lie unread.
 *
 * Files of one lane are closed one after the other, so whoever fills a lane holds up at most one thread. A file that
 * takes long delays other lanes by PATIENCE once: then they get another thread.
 */
class Closer {
 public:
  /** Milliseconds without a close that has ended until another thread is started for what waits. */
  static constexpr int PATIENCE = 20;
  /** Milliseconds that a thread waits for more: to start one takes longer than most closes. */
  static constexpr int IDLE = 1000;

  /** @param most threads at a time; when all are held up, everything waits */
  explicit Closer(unsigned most) : most(most) {}
  Closer(const Closer&) = delete;
  Closer& operator=(const Closer&) = delete;

  /**
   * The one of the process. It is never destroyed: its threads are not waited for, neither at the end of a program nor
   * by the kernel, which ends the wait of a socket that lingers.
   */
  static Closer& shared();

  /** Takes over the fd and returns at once. */
  void close(uint64_t lane, int fd);
  /** Files of the lane that are not closed yet; of all lanes for 0. */
  size_t pending(uint64_t lane);
  /** Until nothing is pending, for at most so long. False where something still is. */
  bool wait(int milliseconds);

 private:
  struct Lane {
    std::deque<int> waiting;
    /** One of its files is being closed. */
    bool busy = false;
  };
  static void* dispatch(void* self);
  static void* work(void* self);
  void dispatchReady(std::unique_lock<std::mutex>& lock);
  void closeReady(std::unique_lock<std::mutex>& lock);
  /** To a thread that waits for more; false where none does. */
  bool handOver();

  const unsigned most;
  std::mutex mutex;
  std::condition_variable arrived;
  std::condition_variable handedOver;
  std::condition_variable ended;
  /** Those with a pending file, and no others. */
  std::unordered_map<uint64_t, Lane> lanes;
  /** Those of which no file is being closed. */
  std::deque<uint64_t> ready;
  size_t total = 0;
  /** Files closed so far. */
  uint64_t done = 0;
  /** Threads that close. */
  unsigned workers = 0;
  /** Threads that wait for more, and those of them that are about to find some. */
  unsigned idle = 0;
  unsigned handed = 0;
  bool dispatching = false;
};

}  // namespace vhostd
