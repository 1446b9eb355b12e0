#include <cstring>

#include "test/check.h"
#include "test/ring-load.h"

using namespace vhostd::ring;

namespace {

/** Some requests are at the device at any time, and come back in any order. */
const Parameters kSlowly = {{"slow", int64_t{1}}, {"outOfOrder", true}};
const Parameters kShuffled = {{"outOfOrder", true}};

bool advances(const Load& load) {
  const uint64_t before = load.completed();
  return check::eventually([&] { return load.completed() > before + 50; });
}

TEST(ring_quiesced_under_load_takes_nothing_and_completes_what_it_took) {
  for (const Parameters& parameters : {Parameters{}, kShuffled, kSlowly}) {
    Rig rig(parameters);
    rig.start();
    Load load(rig);
    for (int round = 0; round < 10; round++) {
      CHECK(advances(load));
      rig.function->quiesce();
      const uint16_t taken = rig.function->rings()[0].lastAvail;
      // A chain is in flight until the driver can see that it is not.
      bool shown = true;
      CHECK(check::eventually([&] {
        for (int look = 0; look < 2000; look++) {
          const uint32_t inFlight = rig.function->inFlight();
          shown &= static_cast<uint16_t>(taken - rig.used()) <= inFlight;
          if (inFlight == 0) return true;
        }
        return false;
      }));
      CHECK(shown);
      CHECK(rig.used() == taken);
      usleep(2000);
      const std::vector<QueueState> rings = rig.function->rings();
      CHECK(rings.size() == 1 && rings[0].lastAvail == taken && rings[0].lastUsed == taken);
      CHECK(rings[0].inFlight.empty());
      rig.function->unquiesce();
    }
    CHECK(advances(load));
    CHECK(load.finish());
  }
}

TEST(ring_whose_calls_block_drains_and_ends) {
  // Its requests end one by one, within that time.
  Rig rig({{"slow", int64_t{40}}, {"outOfOrder", true}});
  const int full = eventfd(0, EFD_CLOEXEC);
  CHECK(eventfd_write(full, UINT64_MAX - 1) == 0);
  CHECK(rig.function->setCall(0, full));
  constexpr uint64_t kEveryCall = kFeatures & ~(1ull << 29);
  constexpr uint16_t kRequests = 10;
  for (uint16_t slot = 0; slot < kRequests; slot++) rig.put(slot, 0, 0, kIova + (1 << 20));
  CHECK(rig.function->activate(0, Rig::config(), kEveryCall).empty());
  CHECK(rig.function->start(kEveryCall).empty());
  CHECK(check::eventually([&] { return rig.used() > 0; }));
  rig.function->quiesce();
  CHECK(check::eventually([&] { return rig.function->passCalls(); }));
  CHECK(check::eventually([&] { return rig.function->inFlight() == 0; }));
  CHECK(rig.used() == kRequests);

  rig.put(kRequests, 0, 0, kIova + (1 << 20));
  rig.function->unquiesce();
  CHECK(check::eventually([&] { return rig.used() == kRequests + 1; }));
  rig.stop(true);
  close(full);
}

TEST(ring_quiesced_before_the_start_serves_what_was_in_flight_and_nothing_else) {
  Rig rig({}, "blk", 7);
  rig.put(0, 0, 0, kIova + (1 << 20));
  rig.put(1, 0, 0, kIova + (1 << 20));
  QueueConfig config = Rig::config(8, 7);
  config.inFlight = {0};
  rig.function->quiesce();
  CHECK(rig.function->activate(0, config, kFeatures).empty());
  CHECK(rig.function->inFlight() == 1);
  CHECK(rig.function->start(kFeatures).empty());
  CHECK(rig.awaitUsed(8));
  usleep(5000);
  CHECK(rig.used() == 8 && rig.function->inFlight() == 0);
  rig.park();
  CHECK(rig.function->start(kFeatures).empty());
  usleep(5000);
  CHECK(rig.used() == 8);
  rig.function->unquiesce();
  CHECK(rig.awaitUsed(9));
}

/** Every round ends in the middle of requests; the indices wrap on the way. */
void moveUnderLoad(const Parameters& parameters, int rounds) {
  Rig rig(parameters, "blk", 65000);
  const int kick = eventfd(0, EFD_CLOEXEC);
  rig.kick = kick;
  CHECK(rig.function->setKick(0, kick) == 0);
  rig.start();
  size_t kept = 0;
  {
    Load load(rig);
    for (int round = 0; round < rounds; round++) {
      CHECK(advances(load));
      rig.park();
      const std::vector<QueueState> rings = rig.function->rings();
      CHECK(rings.size() == 1 && rings[0].inFlight.size() == rig.function->inFlight());
      CHECK(rings[0].inFlight.size() == static_cast<uint16_t>(rings[0].lastAvail - rings[0].lastUsed));
      kept += rings[0].inFlight.size();
      if (round % 4 == 3) {
        CHECK(rig.function->start(kFeatures).empty());
        continue;
      }
      rig.stop(false);
      CHECK(rig.function->inFlight() == 0 && rig.function->rings().empty());
      if (round % 2 == 0) {
        rig.create();
        CHECK(rig.function->setKick(0, kick) == 0);
      }
      QueueConfig config = Rig::config(rings[0].lastAvail, rings[0].lastUsed);
      config.inFlight = rings[0].inFlight;
      rig.start(config);
    }
    CHECK(load.finish());
  }
  if (!parameters.empty()) CHECK(kept > 0);
  CHECK(rig.function->failure().empty());
  close(kick);
}

TEST(ring_moves_elsewhere_under_load_with_its_requests) { moveUnderLoad({}, 40); }
TEST(ring_moves_elsewhere_under_load_with_its_requests_out_of_order) { moveUnderLoad(kSlowly, 40); }

TEST(ring_stopped_at_once_finishes_what_was_in_flight) {
  Rig rig;
  for (uint16_t slot = 0; slot < 5; slot++) rig.put(slot, 0, slot, kIova + (1 << 20));
  QueueConfig config = Rig::config(4, 0);
  config.inFlight = {0, 3, 6, 9};
  rig.function->quiesce();
  rig.start(config);
  rig.stop(true);
  CHECK(rig.used() == 4 && rig.function->indices()[0].lastAvail == 4);
  for (uint16_t slot = 0; slot < 5; slot++) CHECK(rig.status(slot) == (slot < 4 ? 0 : 0xff));
}

TEST(ring_heads_in_flight_are_checked) {
  Rig rig;
  const auto refusal = [&](uint16_t lastAvail, uint16_t lastUsed, std::vector<uint16_t> heads) {
    QueueConfig config = Rig::config(lastAvail, lastUsed);
    config.inFlight = std::move(heads);
    return rig.function->activate(0, config, kFeatures);
  };
  CHECK(refusal(2, 0, {64}).find("64 is outside") != std::string::npos);
  CHECK(refusal(2, 0, {3, 3}).find("twice") != std::string::npos);
  CHECK(refusal(1, 0, {0, 3}).find("2 chains") != std::string::npos);
  CHECK(refusal(0, 1, {}).find("65535 ahead") != std::string::npos);
  // A head that is not there is found when it is read.
  rig.describe(3, kIova, 16, 1, 99);
  CHECK(refusal(1, 0, {3}).empty());
  CHECK(refusal(1, 0, {3}).find("is active") != std::string::npos);
  CHECK(rig.function->start(kFeatures).empty());
  CHECK(check::eventually([&] { return rig.function->failure().find("chain 3 links to") != std::string::npos; }));
  rig.stop(false);
}

TEST(ring_kick_that_is_replaced_under_fire_loses_nothing) {
  Rig rig;
  const int kicks[] = {eventfd(0, EFD_CLOEXEC), eventfd(0, EFD_CLOEXEC)};
  rig.kick = kicks[0];
  CHECK(rig.function->setKick(0, kicks[0]) == 0);
  rig.start();
  {
    Load load(rig);
    for (int round = 0; round < 200; round++) {
      const int next = kicks[(round + 1) % 2];
      CHECK(rig.function->setKick(0, next) == 0);
      rig.kick = next;
      // The driver may have notified the former after it was replaced.
      signalFd(next);
      if (round % 20 == 0) CHECK(advances(load));
    }
    CHECK(load.finish());
  }
  for (const int kick : kicks) {
    // Never read.
    uint64_t signals = 0;
    CHECK(read(kick, &signals, sizeof signals) == sizeof signals && signals >= 100);
    close(kick);
  }
}

TEST(ring_kick_counts_before_it_is_set_and_not_after_it_was_taken_away) {
  Rig rig;
  const int kick = eventfd(0, EFD_CLOEXEC);
  rig.kick = kick;
  rig.put(0, 0, 0, kIova + (1 << 20));
  CHECK(rig.function->setKick(0, kick) == 0);
  rig.start(Rig::config());
  CHECK(rig.awaitUsed(1));
  // Notified while nobody looks, and then replaced.
  rig.park();
  rig.put(1, 0, 0, kIova + (1 << 20));
  CHECK(rig.function->setKick(0, -1) == 0);
  CHECK(rig.function->start(kFeatures).empty());
  CHECK(rig.awaitUsed(2));
  usleep(5000);
  rig.put(2, 0, 0, kIova + (1 << 20));
  usleep(5000);
  CHECK(rig.used() == 2);
  signalFd(rig.function->doorbell(0));
  CHECK(rig.awaitUsed(3));
  CHECK(rig.function->setKick(0, rig.file) == -EPERM);
  CHECK(rig.function->setKick(0, 1'000'000) == -EBADF);
  close(kick);
}

}  // namespace
