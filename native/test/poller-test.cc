#include "poller.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <set>
#include <vector>

#include "symbols.h"
#include "test/check.h"

using vhostd::Poller;

namespace {

struct Harness {
  Poller poller{[](void* self) { static_cast<Harness*>(self)->wakes++; }, this};
  std::atomic<int> wakes{0};
  Harness() { CHECK(poller.start() == 0); }
};

}  // namespace

TEST(poller_reports_once_until_rearmed) {
  Harness harness;
  int fd = vhostd_eventfd();
  int64_t token = harness.poller.add(fd, EPOLLIN);
  CHECK(token > 0);
  vhostd_signal_eventfd(fd);
  CHECK(check::eventually([&] { return harness.wakes == 1; }));
  CHECK(harness.poller.take() == std::vector<uint64_t>{static_cast<uint64_t>(token)});
  vhostd_signal_eventfd(fd);
  usleep(2000);
  CHECK(harness.poller.take().empty());
  CHECK(harness.poller.rearm(token) == 0);
  CHECK(check::eventually([&] { return !harness.poller.take().empty(); }));
  harness.poller.remove(token);
  CHECK(harness.poller.rearm(token) == -ENOENT);
  close(fd);
}

TEST(poller_survives_the_close_of_a_watched_fd) {
  Harness harness;
  int fd = vhostd_eventfd();
  int64_t token = harness.poller.add(fd, EPOLLIN);
  int peer = vhostd_dup(fd);
  close(fd);
  int other = vhostd_eventfd();
  CHECK(other == fd);
  vhostd_signal_eventfd(other);
  usleep(2000);
  CHECK(harness.poller.take().empty());
  vhostd_signal_eventfd(peer);
  CHECK(check::eventually([&] { return !harness.poller.take().empty(); }));
  harness.poller.remove(token);
  close(peer);
  close(other);
}

TEST(poller_is_silent_about_a_removed_watch_whose_file_lives_on) {
  Harness harness;
  int fd = vhostd_eventfd();
  int64_t token = harness.poller.add(fd, EPOLLIN);
  harness.poller.remove(token);
  vhostd_signal_eventfd(fd);
  usleep(2000);
  CHECK(harness.wakes == 0);
  close(fd);
}

TEST(poller_wakes_again_only_after_take) {
  Harness harness;
  int first = vhostd_eventfd();
  int second = vhostd_eventfd();
  harness.poller.add(first, EPOLLIN);
  vhostd_signal_eventfd(first);
  CHECK(check::eventually([&] { return harness.wakes == 1; }));
  harness.poller.add(second, EPOLLIN);
  vhostd_signal_eventfd(second);
  usleep(2000);
  CHECK(harness.wakes == 1);
  size_t taken = 0;
  CHECK(check::eventually([&] { return (taken += harness.poller.take().size()) == 2; }));
  close(first);
  close(second);
}

TEST(poller_under_churn) {
  Harness harness;
  std::set<uint64_t> live;
  std::set<uint64_t> seen;
  int fds[32];
  for (int& fd : fds) {
    fd = vhostd_eventfd();
    vhostd_signal_eventfd(fd);
  }
  for (int round = 0; round < 3000; round++) {
    int64_t token = harness.poller.add(fds[round % 32], EPOLLIN);
    if (token <= 0) CHECK(token > 0);
    if (live.count(token) != 0) CHECK(!"a token was used twice");
    live.insert(token);
    for (uint64_t reported : harness.poller.take()) seen.insert(reported);
    if (round % 3 != 0) {
      harness.poller.remove(token);
      live.erase(token);
    }
  }
  CHECK(check::eventually([&] {
    for (uint64_t reported : harness.poller.take()) seen.insert(reported);
    for (uint64_t token : live) {
      if (seen.count(token) == 0) return false;
    }
    return true;
  }));
  for (int fd : fds) close(fd);
}

TEST(poller_stops_and_starts_again) {
  Harness harness;
  int fd = vhostd_eventfd();
  for (int round = 0; round < 50; round++) {
    CHECK(harness.poller.add(fd, EPOLLIN) > 0);
    if (round % 2 == 0) vhostd_signal_eventfd(fd);
    harness.poller.stop();
    CHECK(harness.poller.add(fd, EPOLLIN) == -ESRCH);
    CHECK(harness.poller.start() == 0);
    vhostd_drain_eventfd(fd);
  }
  close(fd);
}
