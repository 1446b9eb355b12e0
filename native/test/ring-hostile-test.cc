#include <cstring>
#include <random>

#include "test/check.h"
#include "test/ring-rig.h"

using namespace vhostd::ring;

namespace {

/** A driver that writes anything anywhere into its rings, most of it nearly right, while the worker reads it. */
class Hostile {
 public:
  Hostile(Rig& rig, uint32_t seed) : rig_(rig), random_(seed) {}

  void act() {
    for (unsigned count = pick(24); count > 0; count--) describe(rig_.memory, pick(kRing));
    for (unsigned count = pick(24); count > 0; count--) describe(rig_.memory + kTables, pick(4 * kRing));
    for (unsigned count = pick(8); count > 0; count--) rig_.memory[kHeaders + 16 * pick(64)] = pick(14);
    for (unsigned count = pick(4); count > 0; count--) offer();
    if (rarely()) word(rig_.memory + kDriverPart + 2, static_cast<uint16_t>(random_()));
    if (rarely()) rig_.memory[pick(3 * 4096)] = static_cast<uint8_t>(random_());
    signalFd(rig_.function->doorbell(0));
  }
  unsigned pick(unsigned limit) { return static_cast<unsigned>(random_() % limit); }

 private:
  static constexpr size_t kTables = 16384;

  static void word(uint8_t* at, uint16_t value) { memcpy(at, &value, 2); }
  bool rarely() { return pick(200) == 0; }

  void offer() {
    const uint16_t head = rarely() ? pick(70) : rig_.available % (kRing / 4) * 4;
    word(rig_.memory + kDriverPart + 4 + 2 * (rig_.available % kRing), head);
    word(rig_.memory + kDriverPart + 2, ++rig_.available);
  }

  /** Four to a chain: a header, two buffers and a status, unless something is different. */
  void describe(uint8_t* table, unsigned index) {
    uint8_t* at = table + 16 * index;
    const unsigned role = index % 4;
    uint64_t address = role == 1 || role == 2 ? kIova + (1 << 20) + pick(1 << 20) : kIova + kHeaders + 16 * pick(64);
    uint32_t length = role == 0 ? 16 : 512 * pick(4) + (role == 3 ? 1 : 0);
    uint16_t flags = role == 3 ? 2 : role == 0 || pick(3) == 0 ? 1 : 3;
    uint16_t next = static_cast<uint16_t>((table == rig_.memory ? index : role) + 1);
    if (pick(20) == 0) {
      const uint64_t places[] = {kIova + kTables + 64 * pick(16), kIova + pick(3 * 4096), kIova + kMemory - pick(1024),
                                 random_(), UINT64_MAX - pick(64)};
      address = places[pick(5)];
    }
    if (pick(20) == 0) {
      const uint32_t lengths[] = {0, 1, 17, 1 << 20, (1 << 20) + 1, UINT32_MAX};
      length = lengths[pick(6)];
    }
    if (pick(20) == 0) {
      flags = 4;
      address = kIova + kTables + 64 * pick(64);
      length = 64;
    }
    if (rarely()) flags = static_cast<uint16_t>(random_());
    if (rarely()) next = static_cast<uint16_t>(random_());
    memcpy(at, &address, 8);
    memcpy(at + 8, &length, 4);
    word(at + 12, flags);
    word(at + 14, next);
  }

  Rig& rig_;
  std::minstd_rand random_;
};

/** Whatever the driver did, the function stops, and serves the next driver. */
void survives(Rig& rig, uint32_t seed, const std::function<void()>& control, const std::function<void()>& verify) {
  Hostile hostile(rig, seed);
  for (int action = 0; action < 100; action++) hostile.act();
  int failures = 0;
  for (int round = 0; round < 150; round++) {
    QueueConfig config = Rig::config(static_cast<uint16_t>(hostile.pick(8)));
    for (unsigned count = hostile.pick(8); count > 0; count--) config.inFlight.push_back(hostile.pick(kRing));
    if (!rig.function->activate(0, config, kFeatures).empty()) {
      config = Rig::config();
      CHECK(rig.function->activate(0, config, kFeatures).empty());
    }
    rig.available = config.lastAvail;
    memcpy(rig.memory + kDriverPart + 2, &config.lastAvail, 2);
    CHECK(rig.function->start(kFeatures).empty());
    for (int action = 0; action < 30 && rig.function->failure().empty(); action++) {
      hostile.act();
      usleep(hostile.pick(2) * 50);
      control();
    }
    failures += !rig.function->failure().empty();
    rig.stop(hostile.pick(2) == 0);
    CHECK(rig.function->inFlight() == 0);
  }
  CHECK(failures > 0 && rig.function->stats(0).completed > 0);
  memset(rig.memory, 0, 3 * 4096);
  rig.available = 0;
  rig.start();
  verify();
}

TEST(ring_survives_a_hostile_driver) {
  for (uint32_t seed = 1; seed <= 3; seed++) {
    Rig rig(seed == 3 ? Parameters{{"outOfOrder", true}} : Parameters{});
    survives(rig, seed, [] {}, [&] {
      rig.put(0, 0, 0, kIova + (1 << 20));
      CHECK(rig.awaitUsed(1));
      CHECK(rig.status(0) == 0);
    });
  }
}

TEST(ring_survives_a_hostile_driver_that_control_answers) {
  for (uint32_t seed = 11; seed <= 12; seed++) {
    Rig rig({}, "forward");
    const auto answer = [&] {
      for (const ForwardedRequest& request : rig.function->takeRequests()) {
        rig.function->answer(request.id, std::vector<uint8_t>(request.writable));
      }
    };
    survives(rig, seed, answer, [&] {
      rig.describe(0, kIova + (1 << 20), 16, 2, 0);
      rig.offer(0);
      CHECK(check::eventually([&] { return answer(), rig.used() == 1; }));
    });
  }
}

}  // namespace
