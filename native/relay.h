#pragma once

#include <stdint.h>

#include <mutex>
#include <unordered_map>

#include "epoll-thread.h"
#include "eventfd-signal.h"
#include "forwarder.h"

namespace vhostd {

/**
 * A thread that carries kicks to doorbells. A kick eventfd belongs to a peer and is never read, which could block:
 * it is watched for edges (EPOLLET), and each signal is one, whatever the counter holds. A kick whose counter is not
 * zero when it is connected rings at once.
 *
 * Where the kernel can forward from one eventfd to another, a second thread has it do so.
 */
class Relay {
 public:
  enum class Forward { whereKernelCan, never };

  explicit Relay(Forward forward = Forward::whereKernelCan) : forward(forward) {}
  ~Relay() { stop(); }
  Relay(const Relay&) = delete;
  Relay& operator=(const Relay&) = delete;

  /** 0 or -errno. Nothing when it runs already. */
  int start();
  /** Cuts all connections and ends the thread. May be started again. */
  void stop();

  /** The connection's number (> 0) or -errno. Each kick adds 1 to `doorbell`. The files are held, not the fds. */
  int64_t connect(int kick, int doorbell);
  /**
   * Each kick writes `value` at `address`, `width` bytes (2 or 4) at once. The mapping must outlive the connection.
   * A write that faults, because the file behind the mapping became shorter, cuts the connection.
   */
  int64_t connect(int kick, uintptr_t address, int width, uint32_t value);
  /** When this returns the thread is done with the connection. */
  void disconnect(uint64_t number);

 private:
  struct Connection {
    int kick;
    /** An eventfd, or -1: `address` is written. */
    int doorbell;
    uintptr_t address;
    int width;
    uint32_t value;
  };
  static void* run(void* self);
  void loop();
  uint64_t newNumber();
  int64_t add(const Connection& connection);
  void remove(std::unordered_map<uint64_t, Connection>::iterator which);
  /** False when the doorbell is gone. */
  bool ring(const Connection& connection);

  const Forward forward;
  Forwarder forwarder;
  EpollThread thread;
  /** Held while a doorbell rings: who holds it otherwise knows that the thread touches no connection. */
  std::mutex mutex;
  std::unordered_map<uint64_t, Connection> connections;
  uint64_t lastNumber = 0;
  EventfdSignal eventfdSignal;
};

}  // namespace vhostd
