#include "relay.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include <atomic>

#include "guard.h"
#include "priority.h"
#include "thread.h"

namespace vhostd {
namespace {

/** One write of exactly this width. */
template <typename Word>
void store(uintptr_t address, uint32_t value) {
  __atomic_store_n(reinterpret_cast<volatile Word*>(address), static_cast<Word>(value), __ATOMIC_RELAXED);
}

}  // namespace

int Relay::start() {
  // Without it all goes through this thread.
  if (forward == Forward::whereKernelCan) forwarder.start();
  return thread.start(run, this);
}

void Relay::stop() {
  forwarder.stop();
  thread.stop();
  while (!connections.empty()) remove(connections.begin());
}

int64_t Relay::connect(int kick, int doorbell) {
  const uint64_t forwarded = newNumber();
  if (forwarder.connect(forwarded, kick, doorbell) == 0) return static_cast<int64_t>(forwarded);
  int own = fcntl(doorbell, F_DUPFD_CLOEXEC, 3);
  if (own < 0) return -errno;
  int64_t number = add({kick, own, 0, 0, 0});
  if (number < 0) close(own);
  return number;
}

int64_t Relay::connect(int kick, uintptr_t address, int width, uint32_t value) {
  if (width != 2 && width != 4) return -EINVAL;
  return add({kick, -1, address, width, value});
}

uint64_t Relay::newNumber() {
  std::lock_guard<std::mutex> lock(mutex);
  return ++lastNumber;
}

int64_t Relay::add(const Connection& connection) {
  Connection own = connection;
  std::lock_guard<std::mutex> lock(mutex);
  uint64_t number = ++lastNumber;
  own.kick = thread.watch(connection.kick, EPOLLIN | EPOLLET, number);
  if (own.kick < 0) return own.kick;
  connections[number] = own;
  return static_cast<int64_t>(number);
}

void Relay::disconnect(uint64_t number) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = connections.find(number);
    if (found != connections.end()) return remove(found);
  }
  forwarder.disconnect(number);
}

void Relay::remove(std::unordered_map<uint64_t, Connection>::iterator which) {
  thread.drop(which->second.kick);
  if (which->second.doorbell >= 0) close(which->second.doorbell);
  connections.erase(which);
}

bool Relay::ring(const Connection& connection) {
  if (connection.doorbell >= 0) return eventfdSignal.signal(connection.doorbell) == 0;
  // What the guest wrote to its ring before the kick must be visible to the device before the doorbell is.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return guarded([&connection] {
    if (connection.width == 2) store<uint16_t>(connection.address, connection.value);
    else store<uint32_t>(connection.address, connection.value);
  });
}

void* Relay::run(void* self) {
  nameThread("vhostd-relay");
  preferThisThread();
  static_cast<Relay*>(self)->loop();
  return nullptr;
}

void Relay::loop() {
  epoll_event events[64];
  for (;;) {
    int count = thread.wait(events, 64);
    for (int index = 0; index < count; index++) {
      if (events[index].data.u64 == EpollThread::STOP) return;
      std::lock_guard<std::mutex> lock(mutex);
      // An event of a connection that was cut after epoll_wait finds nobody: numbers are not used again.
      auto found = connections.find(events[index].data.u64);
      if (found != connections.end() && !ring(found->second)) remove(found);
    }
  }
}

}  // namespace vhostd
