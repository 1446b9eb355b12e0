#include "relay.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>

#include "guard.h"
#include "thread.h"

namespace vhostd {
namespace {

constexpr uint64_t STOP = 0;

/** One write of exactly this width. */
template <typename Word>
void store(uintptr_t address, uint32_t value) {
  __atomic_store_n(reinterpret_cast<volatile Word*>(address), static_cast<Word>(value), __ATOMIC_RELAXED);
}

}  // namespace

int Relay::start() {
  if (epoll >= 0) return 0;
  epoll = epoll_create1(EPOLL_CLOEXEC);
  stopFd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  epoll_event stopping = {};
  stopping.events = EPOLLIN;
  stopping.data.u64 = STOP;
  int result = 0;
  if (epoll < 0 || stopFd < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, stopFd, &stopping) < 0) result = -errno;
  if (result == 0) result = startThread(&thread, run, this);
  if (result == 0) return 0;
  if (epoll >= 0) close(epoll);
  if (stopFd >= 0) close(stopFd);
  epoll = stopFd = -1;
  return result;
}

void Relay::stop() {
  if (epoll < 0) return;
  eventfd_write(stopFd, 1);
  pthread_join(thread, nullptr);
  while (!connections.empty()) remove(connections.begin());
  close(stopFd);
  close(epoll);
  epoll = stopFd = -1;
}

int64_t Relay::connect(int kick, int doorbell) {
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

int64_t Relay::add(const Connection& connection) {
  if (epoll < 0) return -ESRCH;
  Connection own = connection;
  own.kick = fcntl(connection.kick, F_DUPFD_CLOEXEC, 3);
  if (own.kick < 0) return -errno;
  std::lock_guard<std::mutex> lock(mutex);
  uint64_t number = ++lastNumber;
  epoll_event event = {};
  event.events = EPOLLIN | EPOLLET;
  event.data.u64 = number;
  if (epoll_ctl(epoll, EPOLL_CTL_ADD, own.kick, &event) < 0) {
    int error = errno;
    close(own.kick);
    return -error;
  }
  connections[number] = own;
  return static_cast<int64_t>(number);
}

void Relay::disconnect(uint64_t number) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = connections.find(number);
  if (found != connections.end()) remove(found);
}

void Relay::remove(std::unordered_map<uint64_t, Connection>::iterator which) {
  // Explicitly: the file lives on behind the fd that was duplicated, and epoll would keep reporting it.
  epoll_ctl(epoll, EPOLL_CTL_DEL, which->second.kick, nullptr);
  close(which->second.kick);
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
  static_cast<Relay*>(self)->loop();
  return nullptr;
}

void Relay::loop() {
  epoll_event events[64];
  for (;;) {
    int count = epoll_wait(epoll, events, 64, -1);
    for (int index = 0; index < count; index++) {
      if (events[index].data.u64 == STOP) return;
      std::lock_guard<std::mutex> lock(mutex);
      // An event of a connection that was cut after epoll_wait finds nobody: numbers are not used again.
      auto found = connections.find(events[index].data.u64);
      if (found != connections.end() && !ring(found->second)) remove(found);
    }
  }
}

}  // namespace vhostd
