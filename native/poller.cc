#include "poller.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "thread.h"

namespace vhostd {
namespace {

constexpr uint64_t STOP = 0;

}  // namespace

int Poller::start() {
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

void Poller::stop() {
  if (epoll < 0) return;
  eventfd_write(stopFd, 1);
  pthread_join(thread, nullptr);
  for (auto& [token, watch] : watches) close(watch.fd);
  watches.clear();
  reported.clear();
  woken = false;
  close(stopFd);
  close(epoll);
  epoll = stopFd = -1;
}

int64_t Poller::add(int fd, uint32_t events) {
  if (epoll < 0) return -ESRCH;
  int own = fcntl(fd, F_DUPFD_CLOEXEC, 3);
  if (own < 0) return -errno;
  std::lock_guard<std::mutex> lock(mutex);
  uint64_t token = ++lastToken;
  epoll_event event = {};
  event.events = events | EPOLLONESHOT;
  event.data.u64 = token;
  if (epoll_ctl(epoll, EPOLL_CTL_ADD, own, &event) < 0) {
    int error = errno;
    close(own);
    return -error;
  }
  watches[token] = {own, events};
  return static_cast<int64_t>(token);
}

int Poller::rearm(uint64_t token) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = watches.find(token);
  if (found == watches.end()) return -ENOENT;
  epoll_event event = {};
  event.events = found->second.events | EPOLLONESHOT;
  event.data.u64 = token;
  return epoll_ctl(epoll, EPOLL_CTL_MOD, found->second.fd, &event) < 0 ? -errno : 0;
}

void Poller::remove(uint64_t token) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = watches.find(token);
  if (found == watches.end()) return;
  // Explicitly: the file lives on behind the fd that was duplicated, and epoll would keep reporting it.
  epoll_ctl(epoll, EPOLL_CTL_DEL, found->second.fd, nullptr);
  close(found->second.fd);
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
    int count = epoll_wait(epoll, events, 64, -1);
    bool stopping = false;
    bool waking = false;
    {
      std::lock_guard<std::mutex> lock(mutex);
      for (int index = 0; index < count; index++) {
        if (events[index].data.u64 == STOP) stopping = true;
        else reported.push_back(events[index].data.u64);
      }
      if (!reported.empty() && !woken) woken = waking = true;
    }
    if (stopping) return;
    if (waking) wake(context);
  }
}

}  // namespace vhostd
