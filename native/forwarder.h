#pragma once

#include <pthread.h>
#include <stdint.h>

#include <condition_variable>
#include <functional>
#include <mutex>
#include <unordered_map>

#include "io-ring.h"

namespace vhostd {

/**
 * Carries kick eventfds to doorbell eventfds inside the kernel, in a thread that sleeps there: each connection has an
 * io_uring that polls the kick and whose results signal the doorbell. Neither is read or written, so neither can block
 * the thread, whatever its owner does to it. A doorbell may ring once more than was kicked, now and then.
 */
class Forwarder {
 public:
  Forwarder() = default;
  ~Forwarder() { stop(); }
  Forwarder(const Forwarder&) = delete;
  Forwarder& operator=(const Forwarder&) = delete;

  /** 0 or -errno: there is no io_uring, or it is forbidden. Nothing when it runs already. */
  int start();
  /** Cuts all connections and ends the thread. May be started again. */
  void stop();

  /** 0 or -errno. `number` is one that was never used. A kick that is signalled already rings at once. */
  int connect(uint64_t number, int kick, int doorbell);
  /** When this returns the doorbell does not ring any more. Nothing when there is no such connection. */
  void disconnect(uint64_t number);

 private:
  struct Connection {
    ~Connection();
    IoRing ring;
    int kick = -1;
  };
  static void* run(void* self);
  void loop();
  /** Has the thread do it, waits, and gives what it returned. */
  int perform(const std::function<int()>& work);
  void performOrder();
  void watchOrders();
  int forward(uint64_t number, Connection& connection);
  void refill(uint64_t number);

  pthread_t thread;
  /** The results that the thread wakes up for: an order, and connections whose ring of results is full. */
  IoRing ring;
  /** Signalled with each order; never read. */
  int orders = -1;
  /** The thread's own. */
  std::unordered_map<uint64_t, Connection> connections;
  bool ended = false;

  std::mutex callers;
  std::mutex mutex;
  std::condition_variable performed;
  const std::function<int()>* order = nullptr;
  int result = 0;
};

}  // namespace vhostd
