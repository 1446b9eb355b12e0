#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <fstream>

#include "test/check.h"
#include "test/ring-rig.h"

using namespace vhostd::ring;

namespace {

constexpr uint64_t kExtra = 0x200000000;

/** Reads of the disk hang while it is set; how many do. */
std::atomic<bool> diskHangs{false};
std::atomic<int> hanging{0};

}  // namespace

/** In the place of the C library's. */
extern "C" ssize_t pread(int fd, void* to, size_t length, off_t offset) {
  hanging++;
  while (diskHangs) usleep(100);
  hanging--;
  return syscall(SYS_pread64, fd, to, length, offset);
}

namespace {

TEST(ring_moves_data_while_memory_is_mapped_and_unmapped) {
  Rig rig;
  rig.start();
  const int extra = sizedMemfd(1 << 20);
  const uint64_t data = kIova + (1 << 20);
  bool verified = true;
  for (uint16_t round = 0; round < 300; round++) {
    for (uint16_t slot = 0; slot < 16; slot++) {
      memset(rig.memory + (1 << 20) + slot * kSector, round + slot, kSector);
      rig.put(slot, 1, slot, data + slot * kSector);
    }
    if (round % 8 == 0) CHECK(rig.function->map(kExtra, 1 << 20, extra, 0, true) == 0);
    if (round % 8 == 4) CHECK(rig.function->unmap(kExtra, 1 << 20) == 0);
    verified &= rig.awaitUsed(rig.available);
    for (uint16_t slot = 0; slot < 16; slot++) {
      uint8_t seen[kSector];
      verified &= rig.status(slot) == 0 && pread(rig.disk, seen, kSector, slot * kSector) == kSector;
      verified &= seen[0] == static_cast<uint8_t>(round + slot) && seen[kSector - 1] == seen[0];
    }
    if (!verified) break;
  }
  CHECK(verified);
  CHECK(rig.function->stats(0).completed == 300 * 16);
  CHECK(rig.function->map(kExtra - 4096, 8192, extra, 0, true) == -EEXIST);
  close(extra);
}

TEST(ring_whose_memory_is_cut_away_fails_with_a_reason) {
  Rig rig;
  rig.start();
  for (uint16_t slot = 0; slot < 16; slot++) rig.put(slot, 0, slot, kIova + (1 << 20) + slot * kSector);
  CHECK(rig.awaitUsed(16));
  (void)!ftruncate(rig.file, 0);
  const uint64_t one = 1;
  (void)!write(rig.function->doorbell(0), &one, sizeof one);
  CHECK(check::eventually([&] { return !rig.function->failure().empty(); }));
  CHECK(rig.function->failure().find("gone") != std::string::npos);
  rig.stop(false);
  CHECK(rig.function->failure().empty());
}

TEST(ring_data_in_a_cut_file_is_an_io_error) {
  Rig rig;
  rig.start();
  const int extra = sizedMemfd(1 << 20);
  CHECK(rig.function->map(kExtra, 1 << 20, extra, 0, true) == 0);
  (void)!ftruncate(extra, 0);
  rig.put(0, 0, 0, kExtra);
  rig.put(1, 1, 0, kExtra);
  CHECK(rig.awaitUsed(2));
  CHECK(rig.status(0) == 1 && rig.status(1) == 1);
  CHECK(rig.function->failure().empty());
  close(extra);
}

TEST(ring_does_not_write_to_memory_that_was_mapped_to_be_read) {
  Rig rig;
  rig.start();
  const int extra = sizedMemfd(1 << 20);
  CHECK(rig.function->map(kExtra, 1 << 20, extra, 0, false) == 0);
  rig.put(0, 0, 0, kExtra);
  rig.put(1, 1, 0, kExtra);
  CHECK(rig.awaitUsed(2));
  CHECK(rig.status(0) == 1 && rig.status(1) == 0);
  QueueConfig config = Rig::config();
  config.desc = kExtra;
  config.driver = kExtra + 4096;
  CHECK(rig.function->activate(1, config, kFeatures).empty());
  config.device = kExtra + 8192;
  CHECK(!rig.function->activate(1, config, kFeatures).empty());
  close(extra);
}

TEST(ring_stops_although_the_call_eventfd_of_a_peer_blocks) {
  Rig rig;
  const int full = eventfd(0, EFD_CLOEXEC);
  const uint64_t most = UINT64_MAX - 1;
  (void)!write(full, &most, sizeof most);
  CHECK(rig.function->setCall(0, full));
  rig.start();
  rig.put(0, 0, 0, kIova + (1 << 20));
  CHECK(check::eventually([&] { return rig.used() == 1; }));
  rig.put(1, 0, 0, kIova + (1 << 20));
  usleep(20000);
  // Control is not held up by the worker that hangs.
  CHECK(rig.function->setCall(0, rig.call));
  rig.stop(false);
  close(full);
}

TEST(ring_drain_finishes_what_was_taken_and_a_drop_forgets_it) {
  for (const bool drain : {true, false}) {
    Rig rig({{"slow", int64_t{3'600'000}}});
    rig.start();
    for (uint16_t slot = 0; slot < 8; slot++) rig.put(slot, 0, slot, kIova + (1 << 20));
    usleep(20000);
    CHECK(rig.used() == 0);
    rig.stop(drain);
    CHECK(rig.used() == (drain ? 8 : 0));
    CHECK(rig.function->indices().size() == 1);
    CHECK(rig.function->indices()[0].lastAvail == 8);
    CHECK(rig.function->indices()[0].lastUsed == (drain ? 8 : 0));
  }
}

TEST(ring_control_need_not_wait_for_a_disk_that_hangs) {
  Rig rig;
  const int extra = sizedMemfd(1 << 20);
  rig.start();
  diskHangs = true;
  rig.put(0, 0, 0, kIova + (1 << 20));
  CHECK(check::eventually([] { return hanging == 1; }));
  CHECK(!rig.function->tryEnter(1));
  CHECK(rig.function->setCall(0, rig.call));
  rig.put(1, 0, 0, kIova + (1 << 20));
  diskHangs = false;
  // The worker stays away from the second request until control had its turn.
  CHECK(check::eventually([&] { return hanging == 0 && rig.used() == 1; }));
  CHECK(rig.function->tryEnter(1000));
  CHECK(rig.function->map(kExtra, 1 << 20, extra, 0, true) == 0);
  usleep(20000);
  CHECK(rig.used() == 1);
  rig.function->leave();
  CHECK(rig.awaitUsed(2));

  diskHangs = true;
  rig.put(2, 0, 0, kIova + (1 << 20));
  CHECK(check::eventually([] { return hanging == 1; }));
  CHECK(!rig.function->tryEnter(0));
  rig.function->withdraw();
  diskHangs = false;
  CHECK(rig.awaitUsed(3));
  close(extra);
}

TEST(ring_parked_keeps_what_it_has_and_goes_on) {
  Rig rig({{"slow", int64_t{3'600'000}}});
  rig.start();
  rig.put(0, 0, 0, kIova + (1 << 20));
  usleep(20000);
  rig.function->requestStop(Stop::park);
  CHECK(check::eventually([&] { return rig.function->tryPark(1); }));
  rig.put(1, 0, 0, kIova + (1 << 20));
  CHECK(rig.function->configure({{"slow", int64_t{0}}}).empty());
  usleep(20000);
  CHECK(rig.used() == 0);
  CHECK(rig.function->start(kFeatures).empty());
  CHECK(rig.awaitUsed(2));
}

TEST(ring_requests_that_are_kept_are_served_when_they_need_not_wait_any_more) {
  Rig rig({{"slow", int64_t{3'600'000}}});
  rig.start();
  rig.put(0, 0, 0, kIova + (1 << 20));
  usleep(20000);
  CHECK(rig.function->configure({{"slow", int64_t{0}}}).empty());
  CHECK(rig.awaitUsed(1));
}

TEST(ring_memory_is_given_back_behind_the_scenes) {
  Rig rig;
  constexpr uint64_t kMuch = 16 << 20;
  const int extra = memfd_create("given-back", MFD_CLOEXEC);
  (void)!ftruncate(extra, kMuch);
  CHECK(rig.function->map(kExtra, kMuch, extra, 0, true) == 0);
  CHECK(rig.function->unmap(kExtra, kMuch) == 0);
  CHECK(check::eventually([&] { return !rig.function->unmapping(); }));
  std::ifstream maps("/proc/self/maps");
  const std::string text{std::istreambuf_iterator<char>(maps), {}};
  CHECK(text.find("ring-test") != std::string::npos && text.find("given-back") == std::string::npos);
  close(extra);
}

TEST(ring_unmapped_before_the_start_is_not_served) {
  Rig rig;
  CHECK(rig.function->activate(0, Rig::config(), kFeatures).empty());
  CHECK(rig.function->unmap(kIova, kMemory) == 0);
  CHECK(!rig.function->start(kFeatures).empty());
  CHECK(!rig.function->activate(1, Rig::config(), kFeatures).empty());
}

}  // namespace
