#include <string.h>

#include <atomic>
#include <thread>
#include <vector>

#include "symbols.h"
#include "test/check.h"

namespace {

int64_t at(void* bytes) { return reinterpret_cast<int64_t>(bytes); }

}  // namespace

TEST(frontend_log_touches_no_byte_beside_what_it_was_told) {
  // Each in memory of its own size, whose neighbours the sanitizer watches.
  for (int64_t size = 1; size < 20; size++) {
    for (int64_t first = 0; first < 8 * size; first++) {
      std::vector<uint8_t> log(size);
      CHECK(vhostd_log_mark(at(log.data()), first, 8 * size - first) == 0);
      CHECK(vhostd_log_count(at(log.data()), size) == 8 * size - first);
      std::vector<uint8_t> map(8 * size - first, 1), taken(size), merged(size), copied(size);
      CHECK(vhostd_log_merge_bytemap(at(merged.data()), first, map.data(), map.size()) == 0);
      CHECK(vhostd_log_take_bytemap(at(taken.data()), first, at(map.data()), map.size()) == 0);
      CHECK(vhostd_log_merge_bitmap(at(copied.data()), log.data(), size) == 0);
      CHECK(merged == log && taken == log && copied == log);
      for (uint8_t left : map) CHECK(left == 0);
    }
  }
}

// One takes the map while another fills it, and clears the log while it is marked: each mark is seen.
TEST(frontend_log_loses_no_mark_between_threads) {
  constexpr int64_t PAGES = 256;
  constexpr int ROUNDS = 2000;
  alignas(8) uint8_t map[PAGES] = {};
  alignas(8) uint8_t log[PAGES / 8] = {};
  std::atomic<int> round{0};
  std::thread device([&] {
    for (int number = 1; number <= ROUNDS; number++) {
      __atomic_store_n(map + number * 7 % PAGES, 1, __ATOMIC_RELEASE);
      while (round.load() < number) std::this_thread::yield();
    }
  });
  for (int number = 1; number <= ROUNDS; number++) {
    const int page = number * 7 % PAGES;
    for (bool seen = false; !seen;) {
      CHECK(vhostd_log_take_bytemap(at(log), 0, at(map), PAGES) == 0);
      seen = (__atomic_exchange_n(log + page / 8, 0, __ATOMIC_ACQ_REL) & (1 << page % 8)) != 0;
    }
    round.store(number);
  }
  device.join();
}
