#include "ring/dirty-log.h"

#include <cstring>
#include <numeric>
#include <thread>

#include "test/check.h"
#include "test/ring-rig.h"

using namespace vhostd::ring;

namespace {

constexpr uint64_t kPage = 4096;

std::vector<uint8_t> takeAll(DirtyLog& log) {
  std::vector<uint8_t> map(log.bytes());
  log.take(0, map.size(), map.data());
  return map;
}

/** Pages that are marked, in order. */
std::vector<uint64_t> pagesOf(const std::vector<uint8_t>& map, LogMap kind) {
  std::vector<uint64_t> pages;
  for (uint64_t byte = 0; byte < map.size(); byte++) {
    if (kind == LogMap::bytemap && map[byte] == 1) pages.push_back(byte);
    for (unsigned bit = 0; kind == LogMap::bitmap && bit < 8; bit++) {
      if ((map[byte] >> bit & 1) != 0) pages.push_back(8 * byte + bit);
    }
  }
  return pages;
}

TEST(dirty_log_marks_the_pages_of_its_range_and_no_other) {
  for (const LogMap kind : {LogMap::bitmap, LogMap::bytemap}) {
    for (const uint64_t page : {kPage, 16 * kPage}) {
      const auto log = DirtyLog::own(kind, {10 * page, 100 * page, page});
      CHECK(log->bytes() == (kind == LogMap::bitmap ? 13u : 100u));
      const auto seen = [&](std::initializer_list<std::pair<uint64_t, uint64_t>> writes) {
        for (const auto& [address, length] : writes) log->wrote(address, length);
        CHECK(log->flush());
        return pagesOf(takeAll(*log), kind);
      };
      using Pages = std::vector<uint64_t>;
      CHECK(seen({}) == Pages{});
      CHECK(seen({{0, 10 * page}, {110 * page, page}, {UINT64_MAX - 5, 100}, {20 * page, 0}}) == Pages{});
      CHECK(seen({{10 * page - 1, 2}, {110 * page - 1, 2}}) == (Pages{0, 99}));
      CHECK(seen({{13 * page - 1, 1}, {13 * page, 1}, {15 * page - 1, 2}}) == (Pages{2, 3, 4, 5}));
      CHECK(seen({{12 * page, 1}, {12 * page + 9, 1}, {30 * page, 1}, {12 * page, 1}}) == (Pages{2, 20}));
      Pages all(100);
      std::iota(all.begin(), all.end(), 0);
      CHECK(seen({{0, UINT64_MAX}}) == all);
      CHECK(seen({}) == Pages{});
      Pages middle(30);
      std::iota(middle.begin(), middle.end(), 13);
      CHECK(seen({{23 * page, 30 * page}}) == middle);
    }
  }
}

TEST(dirty_log_whose_map_is_in_pieces) {
  for (const LogMap kind : {LogMap::bitmap, LogMap::bytemap}) {
    std::vector<uint8_t> first(3), second(1), third(200);
    DirtyLog log(kind, {0, 90 * kPage, kPage},
                 {{first.data(), first.size()}, {second.data(), second.size()}, {third.data(), third.size()}});
    log.wrote(0, 90 * kPage);
    CHECK(log.flush());
    std::vector<uint8_t> map(first);
    map.insert(map.end(), second.begin(), second.end());
    map.insert(map.end(), third.begin(), third.end());
    CHECK(pagesOf(map, kind).size() == 90);
    // What lies behind the last page is left alone.
    CHECK(std::count_if(map.begin(), map.end(), [](uint8_t byte) { return byte != 0; }) == (kind == LogMap::bitmap ? 12 : 90));
    if (kind == LogMap::bitmap) CHECK(map[11] == 0x03);
  }
}

/**
 * Two functions mark, each of them every other page, while a third clears. A page is written again when its mark was
 * seen: one that is lost is missing for ever.
 */
TEST(dirty_log_loses_no_mark_to_who_clears_it) {
  for (const LogMap kind : {LogMap::bitmap, LogMap::bytemap}) {
    // Few, that all meet in one byte of the bitmap.
    constexpr uint64_t kPages = 8;
    constexpr int kMarks = 50'000;
    constexpr int kPatience = 100'000;
    std::vector<uint8_t> map(kind == LogMap::bitmap ? kPages / 8 : kPages);
    std::vector<std::atomic<int>> written(kPages), seen(kPages);
    std::atomic<int> running{2};
    const auto marker = [&](uint64_t parity) {
      DirtyLog log(kind, {0, kPages * kPage, kPage}, {{map.data(), map.size()}});
      bool good = true;
      // Where all marks are lost nothing goes on.
      for (int marks = 0, idle = 0; marks < kMarks && idle < kPatience; idle++) {
        for (uint64_t page = parity; page < kPages; page += 2) {
          if (seen[page] != written[page]) continue;
          written[page]++;
          log.wrote(page * kPage, 1);
          good &= log.flush();
          marks++;
          idle = 0;
        }
        if (idle > 0) sched_yield();
      }
      CHECK(good);
      running--;
    };
    const auto clear = [&] {
      for (uint64_t byte = 0; byte < map.size(); byte++) {
        const uint8_t marks = __atomic_exchange_n(&map[byte], uint8_t{0}, __ATOMIC_SEQ_CST);
        for (unsigned bit = 0; bit < 8; bit++) {
          if ((marks >> bit & 1) == 0) continue;
          const uint64_t page = kind == LogMap::bitmap ? 8 * byte + bit : byte;
          seen[page] = written[page].load();
        }
      }
    };
    std::thread one(marker, 0), other(marker, 1);
    while (running > 0) clear();
    one.join();
    other.join();
    clear();
    for (uint64_t page = 0; page < kPages; page++) CHECK(written[page] > 1 && seen[page] == written[page]);
  }
}

TEST(dirty_log_that_is_cut_is_left_alone) {
  std::vector<uint8_t> map(16);
  DirtyLog log(LogMap::bytemap, {0, 16 * kPage, kPage}, {{map.data(), 8}, {map.data() + 8, 8}});
  log.wrote(0, 1);
  CHECK(log.flush());
  log.cutWithin(map.data() + 16, 100, "not this");
  log.cutWithin(map.data() - 100, 100, "not this");
  CHECK(log.lost().empty());
  log.cutWithin(map.data() + 15, 1, "gone");
  log.cut("later");
  CHECK(log.lost() == "gone");
  log.wrote(kPage, 1);
  CHECK(log.flush());
  CHECK(map[0] == 1 && map[1] == 0);
}

TEST(dirty_log_whose_memory_is_gone_is_lost) {
  const int file = sizedMemfd(kPage);
  void* memory = mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  DirtyLog log(LogMap::bitmap, {0, 8 * kPage, kPage}, {{memory, kPage}});
  (void)!ftruncate(file, 0);
  log.wrote(0, 1);
  CHECK(!log.flush());
  CHECK(log.lost().find("is gone") != std::string::npos);
  log.wrote(0, 1);
  CHECK(log.flush());
  munmap(memory, kPage);
  close(file);
}

}  // namespace
