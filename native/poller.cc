#include "poller.h"

#include <errno.h>
#include <unistd.h>

#include "thread.h"

namespace vhostd {

int Poller::start() { return thread.start(run, this); }

void Poller::stop() {
  thread.stop();
  for (auto& [token, watch] : watches) close(watch.fd);
  watches.clear();
  reported.clear();
  woken = false;
}

int64_t Poller::add(int fd, uint32_t events) {
  std::lock_guard<std::mutex> lock(mutex);
  uint64_t token = ++lastToken;
  int own = thread.watch(fd, events | EPOLLONESHOT, token);
  if (own < 0) return own;
  watches[token] = {own, events};
  return static_cast<int64_t>(token);
}

int Poller::rearm(uint64_t token) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = watches.find(token);
  if (found == watches.end()) return -ENOENT;
  return thread.change(found->second.fd, found->second.events | EPOLLONESHOT, token);
}

void Poller::remove(uint64_t token) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = watches.find(token);
  if (found == watches.end()) return;
  thread.drop(found->second.fd);
  watches.erase(found);
}

std::vector<uint64_t> Poller::take() {
  std::lock_guard<std::mutex> lock(mutex);
  std::vector<uint64_t> taken;
  taken.swap(reported);
  woken = false;
  return taken;
}

void* Poller::run(void* self) {
  nameThread("vhostd-poller");
  static_cast<Poller*>(self)->loop();
  return nullptr;
}

void Poller::loop() {
  epoll_event events[64];
  for (;;) {
    int count = thread.wait(events, 64);
    bool stopping = false;
    bool waking = false;
    {
      std::lock_guard<std::mutex> lock(mutex);
      for (int index = 0; index < count; index++) {
        if (events[index].data.u64 == EpollThread::STOP) stopping = true;
        else reported.push_back(events[index].data.u64);
      }
      if (!reported.empty() && !woken) woken = waking = true;
    }
    if (stopping) return;
    if (waking) wake(context);
  }
}

}  // namespace vhostd
