#include <cstring>

#include "test/check.h"
#include "test/net-rig.h"
#include "test/ring-load.h"

using namespace vhostd::ring;

namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kPages = kMemory / kPage;
constexpr LogRange kAll = {kIova, kMemory, kPage};

/** A PF: memory where others mark pages. */
class Lender {
 public:
  Lender() : file(sizedMemfd(kPages)) {
    std::string reason;
    function = RingFunction::create("none", {}, 0, reason);
    map();
    marks = static_cast<uint8_t*>(mmap(nullptr, kPages, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
  }
  ~Lender() {
    function.reset();
    munmap(marks, kPages);
    close(file);
  }
  void map(bool writable = true) { CHECK(function->map(kAt, kPages, file, 0, writable) == 0); }
  void unmap() { CHECK(function->unmap(kAt, kPages) == 0); }
  std::vector<LogPlace> places(uint64_t bytes = kPages) const { return {{kAt, bytes}}; }

  static constexpr uint64_t kAt = 1 << 20;
  int file;
  std::unique_ptr<RingFunction> function;
  /** A byte a page. */
  uint8_t* marks;
};

/** Its first `count` pages as numbers. */
std::vector<uint64_t> marked(const uint8_t* marks, uint64_t count = kPages) {
  std::vector<uint64_t> pages;
  for (uint64_t page = 0; page < count; page++) {
    if (__atomic_load_n(marks + page, __ATOMIC_ACQUIRE) != 0) pages.push_back(page);
  }
  return pages;
}

std::vector<uint8_t> taken(RingFunction& function) {
  std::vector<uint8_t> bytes(function.log()->bytes());
  function.log()->take(0, bytes.size(), bytes.data());
  return bytes;
}

TEST(ring_log_has_each_page_that_a_disk_wrote_and_no_other) {
  Rig rig;
  Lender lender;
  const std::vector<LogPlace> places = lender.places();
  CHECK(rig.function->startLog(LogMap::bytemap, kAll, &places, lender.function.get()).empty());
  rig.start();
  using Pages = std::vector<uint64_t>;
  // A read over a page's end, and one that is refused: its status byte; a write.
  rig.put(0, 0, 0, kIova + 300 * kPage - 100);
  rig.put(1, 0, 1 << 20, kIova + 310 * kPage);
  rig.put(2, 1, 0, kIova + 320 * kPage);
  // Data and status in one buffer.
  rig.put(3, 0, 0, 0);
  rig.describe(9, kIova + kHeaders + 3 * 64, 16, 1, 10);
  rig.describe(10, kIova + 331 * kPage - 100, kSector + 1, 2, 0);
  CHECK(rig.awaitUsed(4));
  rig.park();
  const uint64_t status = kHeaders / kPage;
  const uint64_t used = kDevicePart / kPage;
  CHECK(marked(lender.marks) == (Pages{used, status, 299, 300, 330, 331}));
  memset(lender.marks, 0, kPages);
  rig.function->stopLog();
  CHECK(rig.function->log() == nullptr);
  CHECK(rig.function->start(kFeatures).empty());
  rig.put(4, 0, 0, kIova + 300 * kPage);
  CHECK(rig.awaitUsed(5));
  rig.stop(true);
  CHECK(marked(lender.marks).empty());
}

TEST(ring_log_has_the_pages_of_a_used_ring) {
  Rig rig;
  CHECK(rig.function->startLog(LogMap::bytemap, kAll, nullptr, nullptr).empty());
  constexpr uint16_t kAt = 600;
  constexpr uint64_t kDesc = 1 << 20, kDriver = kDesc + 4 * kPage, kDevice = kDesc + 5 * kPage;
  QueueConfig config;
  config.size = 1024;
  config.desc = kIova + kDesc;
  config.driver = kIova + kDriver;
  config.device = kIova + kDevice;
  config.lastAvail = config.lastUsed = kAt;
  // A flush; its head is 0, as the available ring has it.
  rig.put(0, 4, 0, 0);
  rig.describe(1, kIova + kHeaders + 16, 1, 2, 0);
  memcpy(rig.memory + kDesc, rig.memory, 2 * 16);
  const uint16_t available = kAt + 1;
  memcpy(rig.memory + kDriver + 2, &available, sizeof available);
  rig.start(config);
  const auto* const used = reinterpret_cast<uint16_t*>(rig.memory + kDevice + 2);
  CHECK(check::eventually([&] { return __atomic_load_n(used, __ATOMIC_ACQUIRE) == available; }));
  rig.park();
  // The index, its element, the event.
  const uint64_t first = kDevice / kPage;
  CHECK(marked(taken(*rig.function).data()) == (std::vector<uint64_t>{kHeaders / kPage, first, first + 1, first + 2}));
}

TEST(ring_log_is_written_before_the_driver_is_told) {
  for (const Parameters& parameters : {Parameters{}, Parameters{{"slow", int64_t{1}}, {"outOfOrder", true}}}) {
    Rig rig(parameters);
    CHECK(rig.function->startLog(LogMap::bytemap, kAll, nullptr, nullptr).empty());
    rig.start();
    Load load(rig);
    for (int round = 0; round < 20; round++) {
      const uint64_t before = load.completed();
      CHECK(check::eventually([&] { return load.completed() > before + 20; }));
      rig.park();
      taken(*rig.function);
      // With nothing being done nothing is marked.
      CHECK(marked(taken(*rig.function).data()).empty());
      const uint16_t shown = rig.used();
      CHECK(rig.function->start(kFeatures).empty());
      CHECK(check::eventually([&] { return rig.used() != shown; }));
      const std::vector<uint8_t> map = taken(*rig.function);
      // Status bytes, and used elements.
      CHECK(map[kHeaders / kPage] == 1 && map[kDevicePart / kPage] == 1);
    }
    CHECK(load.finish());
  }
}

TEST(ring_log_goes_on_through_stops_and_can_be_started_anew) {
  Rig rig;
  rig.start();
  Load load(rig);
  for (int round = 0; round < 20; round++) {
    CHECK(rig.function->startLog(round % 2 == 0 ? LogMap::bitmap : LogMap::bytemap, kAll, nullptr, nullptr).empty());
    const uint64_t before = load.completed();
    CHECK(check::eventually([&] { return load.completed() > before + 20; }));
    if (round % 3 == 0) {
      rig.park();
      CHECK(rig.function->start(kFeatures).empty());
    }
    const std::vector<uint8_t> map = taken(*rig.function);
    const uint64_t page = kHeaders / kPage;
    CHECK(round % 2 == 0 ? (map[page / 8] >> page % 8 & 1) == 1 : map[page] == 1);
    rig.function->stopLog();
  }
  CHECK(load.finish());
}

TEST(ring_log_has_frames_and_the_answers_of_the_control_queue) {
  NetRig rig({{"backend", std::string("echo")}});
  const uint64_t pages = rig.queues * NetRig::kPart / kPage;
  CHECK(rig.function->startLog(LogMap::bytemap, {kIova, pages * kPage, kPage}, nullptr, nullptr).empty());
  rig.start();
  rig.offer(0, NetRig::kBuffer, true);
  rig.offer(1, rig.write(1, 100, 1), false);
  CHECK(rig.awaitOne(1) && rig.awaitOne(0));
  CHECK(rig.command({9, 9, 9}) == 1);
  rig.stop();
  const std::vector<uint8_t> map = taken(*rig.function);
  const uint64_t part = NetRig::kPart / kPage;
  const uint64_t used = kDevicePart / kPage;
  const uint64_t buffers = NetRig::kBuffers / kPage;
  const uint64_t answer = buffers + kRing / 2 * NetRig::kBuffer / kPage;
  CHECK(marked(map.data(), pages) ==
        (std::vector<uint64_t>{used, buffers, part + used, 2 * part + used, 2 * part + answer}));
}

TEST(ring_log_in_memory_that_is_unmapped_is_lost_and_the_function_goes_on) {
  Rig rigs[2];
  Lender lender;
  const std::vector<LogPlace> places = lender.places();
  for (Rig& rig : rigs) rig.start();
  {
    Load one(rigs[0]), other(rigs[1]);
    for (int round = 0; round < 10; round++) {
      for (Rig& rig : rigs) {
        CHECK(rig.function->startLog(LogMap::bytemap, kAll, &places, lender.function.get()).empty());
      }
      const uint64_t before = one.completed();
      CHECK(check::eventually([&] { return one.completed() > before + 20; }));
      CHECK(rigs[0].function->log()->lost().empty());
      lender.unmap();
      for (Rig& rig : rigs) CHECK(rig.function->log()->lost().find("unmapped") != std::string::npos);
      CHECK(!marked(lender.marks).empty());
      memset(lender.marks, 0, kPages);
      const uint64_t then = other.completed();
      CHECK(check::eventually([&] { return other.completed() > then + 20; }));
      CHECK(marked(lender.marks).empty());
      lender.map();
    }
    CHECK(one.finish() && other.finish());
  }
  // The lender may go first.
  CHECK(rigs[0].function->startLog(LogMap::bytemap, kAll, &places, lender.function.get()).empty());
  lender.function.reset();
  CHECK(!rigs[0].function->log()->lost().empty());
}

TEST(ring_log_whose_file_is_cut_short_costs_that_function) {
  Rig rig;
  Lender lender;
  const std::vector<LogPlace> places = lender.places();
  CHECK(rig.function->startLog(LogMap::bytemap, kAll, &places, lender.function.get()).empty());
  CHECK(ftruncate(lender.file, 0) == 0);
  rig.start();
  rig.put(0, 0, 0, kIova + (1 << 20));
  CHECK(check::eventually([&] { return rig.function->failure().find("dirty map is gone") != std::string::npos; }));
  // What was not marked is not announced.
  CHECK(rig.used() == 0);
  rig.stop(false);
  CHECK(ftruncate(lender.file, kPages) == 0);
}

TEST(ring_log_is_refused_where_its_map_is_not_mapped_and_writable) {
  Rig rig;
  Lender lender;
  const auto refusal = [&](std::vector<LogPlace> places) {
    return rig.function->startLog(LogMap::bytemap, kAll, &places, lender.function.get());
  };
  CHECK(refusal(lender.places(kPages + 1)).find("not in mapped, writable memory") != std::string::npos);
  CHECK(refusal({{Lender::kAt, 8}, {0, kPages}}).find("0x0+0x400") != std::string::npos);
  lender.unmap();
  lender.map(false);
  CHECK(!refusal(lender.places()).empty());
  CHECK(rig.function->log() == nullptr);
}

}  // namespace
