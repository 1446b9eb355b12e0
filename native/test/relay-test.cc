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

}  // namespace

TEST(relay_carries_each_kick_and_one_from_before) {
  Relay relay;
  CHECK(relay.start() == 0);
  int kick = vhostd_eventfd();
  int doorbell = vhostd_eventfd();
  vhostd_signal_eventfd(kick);
  int64_t number = relay.connect(kick, doorbell);
  CHECK(number > 0);
  for (int round = 0; round < 200; round++) {
    CHECK(check::eventually([&] { return vhostd_drain_eventfd(doorbell) > 0; }));
    vhostd_signal_eventfd(kick);
  }
  CHECK(check::eventually([&] { return vhostd_drain_eventfd(doorbell) > 0; }));
  relay.disconnect(number);
  vhostd_signal_eventfd(kick);
  usleep(2000);
  CHECK(vhostd_drain_eventfd(doorbell) == 0);
  CHECK(vhostd_drain_eventfd(kick) == 202);
  close(kick);
  close(doorbell);
}

TEST(relay_works_with_full_blocking_eventfds) {
  Relay relay;
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

TEST(relay_disconnects_under_traffic) {
  Relay relay;
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
      if (round % 100 == 0) usleep(1000);
      if (place.value() != 0) CHECK(!"silent after disconnect");
    }
  }
  close(kick);
  close(doorbell);
}

TEST(relay_stops_with_connections_and_starts_again) {
  Relay relay;
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
