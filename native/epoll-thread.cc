#include "epoll-thread.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "thread.h"

namespace vhostd {

int EpollThread::start(void* (*run)(void*), void* argument) {
  if (running()) return 0;
  epoll = epoll_create1(EPOLL_CLOEXEC);
  stopFd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  int result = epoll < 0 || stopFd < 0 ? -errno : control(EPOLL_CTL_ADD, stopFd, EPOLLIN, STOP);
  if (result == 0) result = startThread(&thread, run, argument);
  if (result == 0) return 0;
  if (epoll >= 0) close(epoll);
  if (stopFd >= 0) close(stopFd);
  epoll = stopFd = -1;
  return result;
}

void EpollThread::stop() {
  if (!running()) return;
  eventfd_write(stopFd, 1);
  pthread_join(thread, nullptr);
  close(stopFd);
  close(epoll);
  epoll = stopFd = -1;
}

int EpollThread::watch(int fd, uint32_t events, uint64_t token) {
  if (!running()) return -ESRCH;
  int own = fcntl(fd, F_DUPFD_CLOEXEC, 3);
  if (own < 0) return -errno;
  int result = control(EPOLL_CTL_ADD, own, events, token);
  if (result == 0) return own;
  close(own);
  return result;
}

int EpollThread::change(int own, uint32_t events, uint64_t token) { return control(EPOLL_CTL_MOD, own, events, token); }

void EpollThread::drop(int own) {
  // Explicitly: the file lives on behind the fd that was duplicated, and epoll would keep reporting it.
  epoll_ctl(epoll, EPOLL_CTL_DEL, own, nullptr);
  close(own);
}

int EpollThread::control(int operation, int fd, uint32_t events, uint64_t token) {
  epoll_event event = {};
  event.events = events;
  event.data.u64 = token;
  return epoll_ctl(epoll, operation, fd, &event) < 0 ? -errno : 0;
}

}  // namespace vhostd
