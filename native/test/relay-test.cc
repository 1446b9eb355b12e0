#include "relay.h"

#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>

#include "symbols.h"
#include "test/check.h"

using vhostd::Relay;

namespace {

struct Register {
  Register() : fd(vhostd_memfd("register", 4096)) {
    address = reinterpret_cast<uintptr_t>(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
  }
  ~Register() {
    munmap(reinterpret_cast<void*>(address), 4096);
    close(fd);
  }
  uint32_t value() const { return __atomic_load_n(reinterpret_cast<uint32_t*>(address), __ATOMIC_ACQUIRE); }
  void clear() { __atomic_store_n(reinterpret_cast<uint32_t*>(address), 0, __ATOMIC_RELEASE); }
  int fd;
  uintptr_t address;
};

struct Traffic {
  explicit Traffic(int kick) : kick(kick) {
    pthread_create(&thread, nullptr, [](void* self) -> void* {
      auto* traffic = static_cast<Traffic*>(self);
      while (!traffic->done) eventfd_write(traffic->kick, 1);
      return nullptr;
    }, this);
  }
  ~Traffic() {
    done = true;
    pthread_join(thread, nullptr);
  }
  const int kick;
  std::atomic<bool> done{false};
  pthread_t thread;
};

constexpr Relay::Forward WAYS[] = {Relay::Forward::whereKernelCan, Relay::Forward::never};

void carriesEachKickAndOneFromBefore(Relay::Forward forward) {
  Relay relay(forward);
  CHECK(relay.start() == 0);
  int kick = vhostd_eventfd();
  int doorbell = vhostd_eventfd();
  vhostd_signal_eventfd(kick);
  int64_t number = relay.connect(kick, doorbell);
  CHECK(number > 0);
  // More than the kernel has results for.
  for (int round = 0; round < 1000; round++) {
    CHECK(check::eventually([&] { return vhostd_drain_eventfd(doorbell) > 0; }));
    vhostd_signal_eventfd(kick);
  }
  CHECK(check::eventually([&] { return vhostd_drain_eventfd(doorbell) > 0; }));
  // The kernel may add one when it has results again; then there is silence, whatever the kick's counter holds.
  usleep(2000);
  vhostd_drain_eventfd(doorbell);
  usleep(2000);
  CHECK(vhostd_drain_eventfd(doorbell) == 0);
  relay.disconnect(number);
  vhostd_signal_eventfd(kick);
  usleep(2000);
  CHECK(vhostd_drain_eventfd(doorbell) == 0);
  CHECK(vhostd_drain_eventfd(kick) == 1002);
  close(kick);
  close(doorbell);
}

void worksWithFullBlockingEventfds(Relay::Forward forward) {
  Relay relay(forward);
  CHECK(relay.start() == 0);
  int kick = eventfd(0, EFD_CLOEXEC);
  int full = eventfd(0, EFD_CLOEXEC);
  int other = vhostd_eventfd();
  eventfd_write(kick, UINT64_MAX - 1);
  eventfd_write(full, UINT64_MAX - 1);
  int64_t first = relay.connect(kick, full);
  int64_t second = relay.connect(kick, other);
  CHECK(check::eventually([&] { return vhostd_drain_eventfd(other) > 0; }));
  vhostd_signal_eventfd(kick);
  CHECK(check::eventually([&] { return vhostd_drain_eventfd(other) > 0; }));
  relay.disconnect(first);
  relay.disconnect(second);
  for (int fd : {kick, full, other}) close(fd);
}

void isSilentAfterDisconnect(Relay::Forward forward) {
  Relay relay(forward);
  CHECK(relay.start() == 0);
  int kick = vhostd_eventfd();
  int doorbell = vhostd_eventfd();
  bool silent = true;
  for (int round = 0; round < 300; round++) {
    relay.disconnect(relay.connect(kick, doorbell));
    vhostd_drain_eventfd(doorbell);
    for (int kicks = 0; kicks < 20; kicks++) vhostd_signal_eventfd(kick);
    usleep(100);
    silent = silent && vhostd_drain_eventfd(doorbell) == 0;
  }
  CHECK(silent);
  close(kick);
  close(doorbell);
}

void disconnectsUnderTraffic(Relay::Forward forward) {
  Relay relay(forward);
  CHECK(relay.start() == 0);
  int kick = vhostd_eventfd();
  int doorbell = vhostd_eventfd();
  {
    Traffic traffic(kick);
    for (int round = 0; round < 1500; round++) {
      Register place;
      int64_t first = relay.connect(kick, place.address, 4, 1);
      int64_t second = relay.connect(kick, doorbell);
      if (first <= 0 || second <= 0) CHECK(!"connected");
      if (round % 10 == 0) CHECK(check::eventually([&] { return place.value() == 1; }));
      relay.disconnect(first);
      relay.disconnect(second);
      // The memory goes away at once; and nothing arrives any more.
      place.clear();
      vhostd_drain_eventfd(doorbell);
      if (round % 100 == 0) usleep(1000);
      if (place.value() != 0 || vhostd_drain_eventfd(doorbell) != 0) CHECK(!"silent after disconnect");
    }
  }
  close(kick);
  close(doorbell);
}

void stopsWithConnectionsAndStartsAgain(Relay::Forward forward) {
  Relay relay(forward);
  int kick = vhostd_eventfd();
  int doorbell = vhostd_eventfd();
  for (int round = 0; round < 50; round++) {
    CHECK(relay.start() == 0);
    CHECK(relay.connect(kick, doorbell) > 0);
    vhostd_signal_eventfd(kick);
    relay.stop();
  }
  close(kick);
  close(doorbell);
}

}  // namespace

TEST(relay_carries_each_kick_and_one_from_before) {
  for (Relay::Forward way : WAYS) carriesEachKickAndOneFromBefore(way);
}

TEST(relay_works_with_full_blocking_eventfds) {
  for (Relay::Forward way : WAYS) worksWithFullBlockingEventfds(way);
}

TEST(relay_is_silent_after_disconnect) {
  for (Relay::Forward way : WAYS) isSilentAfterDisconnect(way);
}

TEST(relay_disconnects_under_traffic) {
  for (Relay::Forward way : WAYS) disconnectsUnderTraffic(way);
}

TEST(relay_stops_with_connections_and_starts_again) {
  for (Relay::Forward way : WAYS) stopsWithConnectionsAndStartsAgain(way);
}

TEST(relay_writes_a_register_in_its_width) {
  Relay relay;
  CHECK(relay.start() == 0);
  Register place;
  int kick = vhostd_eventfd();
  *reinterpret_cast<uint32_t*>(place.address) = 0xaaaaaaaa;
  int64_t number = relay.connect(kick, place.address, 2, 0x1234);
  vhostd_signal_eventfd(kick);
  CHECK(check::eventually([&] { return place.value() == 0xaaaa1234; }));
  relay.disconnect(number);
  number = relay.connect(kick, place.address, 4, 0x56789abc);
  CHECK(check::eventually([&] { return place.value() == 0x56789abc; }));
  relay.disconnect(number);
  CHECK(relay.connect(kick, place.address, 8, 0) < 0);
  close(kick);
}

TEST(relay_outlives_a_register_that_vanishes) {
  Relay relay;
  CHECK(relay.start() == 0);
  Register lost;
  Register kept;
  int kick = vhostd_eventfd();
  CHECK(ftruncate(lost.fd, 0) == 0);
  int64_t first = relay.connect(kick, lost.address, 4, 1);
  int64_t second = relay.connect(kick, kept.address, 4, 1);
  vhostd_signal_eventfd(kick);
  CHECK(check::eventually([&] { return kept.value() == 1; }));
  relay.disconnect(first);
  relay.disconnect(second);
  close(kick);
}

TEST(relay_serves_many_at_once) {
  for (Relay::Forward way : WAYS) {
    Relay relay(way);
    CHECK(relay.start() == 0);
    constexpr int COUNT = 64;
    int kicks[COUNT];
    int doorbells[COUNT];
    for (int at = 0; at < COUNT; at++) {
      kicks[at] = vhostd_eventfd();
      doorbells[at] = vhostd_eventfd();
      CHECK(relay.connect(kicks[at], doorbells[at]) > 0);
    }
    for (int round = 0; round < 600; round++) {
      for (int kick : kicks) vhostd_signal_eventfd(kick);
      for (int doorbell : doorbells) CHECK(check::eventually([&] { return vhostd_drain_eventfd(doorbell) > 0; }));
    }
    relay.stop();
    for (int at = 0; at < COUNT; at++) {
      close(kicks[at]);
      close(doorbells[at]);
    }
  }
}

TEST(relay_forwards_to_eventfds_only) {
  Relay relay;
  CHECK(relay.start() == 0);
  int kick = vhostd_eventfd();
  int file = vhostd_memfd("no eventfd", 0);
  // Refused at once or with the first kick; it harms nobody.
  int64_t number = relay.connect(kick, file);
  vhostd_signal_eventfd(kick);
  int doorbell = vhostd_eventfd();
  CHECK(relay.connect(kick, doorbell) > 0);
  CHECK(check::eventually([&] { return vhostd_drain_eventfd(doorbell) > 0; }));
  if (number > 0) relay.disconnect(static_cast<uint64_t>(number));
  for (int fd : {kick, file, doorbell}) close(fd);
}

TEST(relay_of_an_eventfd_to_itself_harms_nobody) {
  for (Relay::Forward way : WAYS) {
    Relay relay(way);
    CHECK(relay.start() == 0);
    int same = vhostd_eventfd();
    int kick = vhostd_eventfd();
    int doorbell = vhostd_eventfd();
    int64_t circle = relay.connect(same, same);
    CHECK(circle > 0);
    vhostd_signal_eventfd(same);
    CHECK(relay.connect(kick, doorbell) > 0);
    for (int round = 0; round < 20; round++) {
      vhostd_signal_eventfd(kick);
      CHECK(check::eventually([&] { return vhostd_drain_eventfd(doorbell) > 0; }));
    }
    relay.disconnect(static_cast<uint64_t>(circle));
    relay.stop();
    for (int fd : {same, kick, doorbell}) close(fd);
  }
}
