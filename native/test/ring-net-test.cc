#include <random>
#include <thread>

#include "test/check.h"
#include "test/net-rig.h"

using namespace vhostd::ring;

namespace {

constexpr uint64_t kMergeable = 1ull << 15;
constexpr uint64_t kControl = 1ull << 17 | 1ull << 18 | 1ull << 22;

/** Keeps both queues of a pair busy and looks at every frame that comes. */
class Traffic {
 public:
  Traffic(NetRig& rig, uint16_t pair, uint32_t seed) : rig_(rig), pair_(pair), random_(seed) {}

  void step() {
    const uint16_t receive = static_cast<uint16_t>(2 * pair_), transmit = receive + 1;
    while (!rig_.full(receive)) rig_.offer(receive, NetRig::kBuffer, true);
    while (rig_.collect(transmit)) {
    }
    for (unsigned count = random_() % 32; count > 0 && !rig_.full(transmit); count--) {
      rig_.offer(transmit, rig_.write(transmit, 14 + random_() % 1500, static_cast<uint8_t>(random_())), false);
    }
    for (uint32_t slot, length; rig_.collect(receive, slot, length);) look(rig_.buffer(receive, slot), length);
  }
  uint64_t received = 0;
  uint64_t wrong = 0;

 private:
  void look(const uint8_t* bytes, uint32_t length) {
    received++;
    bool right = length >= sizeof(NetHeader) + kLeastFrame && bytes[10] == 1 && bytes[11] == 0;
    // Behind the addresses, in whatever order they are.
    for (uint32_t index = sizeof(NetHeader) + 13; right && index < length; index++) {
      right = bytes[index] == static_cast<uint8_t>(bytes[index - 1] + 1);
    }
    wrong += !right;
  }

  NetRig& rig_;
  const uint16_t pair_;
  std::minstd_rand random_;
};

/** One end: a function that is made, started, disturbed, stopped and destroyed again and again. */
void liveAndDie(const std::string& wire, uint32_t seed, const std::atomic<bool>& over, std::atomic<uint64_t>& received,
                std::atomic<uint64_t>& wrong) {
  std::minstd_rand random(seed);
  while (!over) {
    const uint16_t pairs = static_cast<uint16_t>(1 + random() % 3);
    NetRig rig({{"backend", std::string("wire")}, {"wire", wire}}, kNetFeatures | kMergeable | kControl, pairs);
    if (!rig.function) {
      wrong++;
      return;
    }
    for (int life = 0; life < 3; life++) {
      rig.start();
      if (pairs > 1 && rig.command({4, 0, static_cast<uint8_t>(pairs), 0}) != 0) wrong++;
      std::vector<Traffic> traffic;
      for (uint16_t pair = 0; pair < pairs; pair++) traffic.emplace_back(rig, pair, random());
      for (unsigned step = 0; step < 100; step++) {
        for (Traffic& each : traffic) each.step();
        switch (random() % 40) {
          case 0:
            rig.function->quiesce();
            if (rig.function->inFlight() != 0) wrong += !check::eventually([&] { return rig.function->inFlight() == 0; });
            rig.function->unquiesce();
            break;
          case 1:
            rig.function->requestStop(Stop::park);
            wrong += !check::eventually([&] { return rig.function->tryPark(1); });
            for (const QueueState& ring : rig.function->rings()) wrong += ring.lastAvail != ring.lastUsed;
            rig.function->start(kNetFeatures | kMergeable | kControl);
            break;
          case 2:
            rig.function->configure({{"link", random() % 2 == 0}});
            break;
          case 3:
            rig.function->configure({{"pairsInUse", static_cast<int64_t>(random() % (pairs + 1u))}});
            break;
          case 4:
            (void)rig.function->carrier();
            (void)rig.function->info();
            break;
          default:
            break;
        }
      }
      rig.function->configure({{"link", true}});
      wrong += !rig.function->failure().empty();
      rig.stop(random() % 2 == 0 ? Stop::drop : Stop::finish);
      for (const Traffic& each : traffic) {
        received += each.received;
        wrong += each.wrong;
      }
    }
  }
}

TEST(net_ends_of_a_wire_come_and_go_under_load) {
  std::atomic<bool> over{false};
  std::atomic<uint64_t> received{0}, wrong{0};
  std::vector<std::thread> ends;
  for (uint32_t seed = 1; seed <= 4; seed++) {
    const std::string wire = seed <= 2 ? "one" : "other";
    ends.emplace_back([&, wire, seed] { liveAndDie(wire, seed, over, received, wrong); });
  }
  usleep(1'500'000);
  over = true;
  for (std::thread& end : ends) end.join();
  CHECK(wrong == 0 && received > 100);
}

TEST(net_third_end_of_a_wire_is_refused) {
  const Parameters parameters = {{"backend", std::string("wire")}, {"wire", std::string("busy")}};
  NetRig one(parameters), other(parameters);
  NetRig third(parameters);
  CHECK(one.function && other.function && !third.function);
  CHECK(third.reason.find("the wire busy has two ends") != std::string::npos);
  other.function.reset();
  NetRig fourth(parameters);
  CHECK(fourth.function);
}

TEST(net_frames_that_are_echoed_go_on_while_control_looks) {
  NetRig rig({{"backend", std::string("echo")}}, kNetFeatures | kControl, 2);
  rig.start();
  CHECK(rig.command({4, 0, 2, 0}) == 0);
  Traffic first(rig, 0, 1), second(rig, 1, 2);
  CHECK(check::eventually([&] {
    first.step();
    second.step();
    rig.function->rings();
    return first.received > 3000 && second.received > 3000;
  }));
  CHECK(first.wrong == 0 && second.wrong == 0 && rig.function->failure().empty());
  const QueueStats stats = rig.function->stats(0);
  CHECK(stats.received == stats.completed && stats.completed >= first.received && stats.bad == 0);
}

/** A receive ring without buffers leaves the worker asleep, whatever comes. */
TEST(net_worker_sleeps_while_nobody_receives) {
  const Parameters parameters = {{"backend", std::string("wire")}, {"wire", std::string("sleepy")}};
  NetRig left(parameters), right(parameters);
  left.start();
  right.start();
  CHECK(check::eventually([&] { return left.function->carrier(); }));
  const auto busy = [] {
    timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
  };
  for (int count = 0; count < 20; count++) {
    left.offer(1, left.write(1, 60, 0), false);
    CHECK(left.awaitOne(1));
  }
  const int64_t before = busy();
  usleep(200'000);
  CHECK(busy() - before < 100'000'000);
  for (int count = 0; count < 20; count++) {
    right.offer(0, NetRig::kBuffer, true);
    CHECK(right.awaitOne(0));
  }
  // With buffers it is woken by each frame that comes when there was none.
  for (int count = 0; count < 5; count++) right.offer(0, NetRig::kBuffer, true);
  for (int count = 0; count < 5; count++) {
    usleep(2000);
    left.offer(1, left.write(1, 60, 0), false);
    CHECK(left.awaitOne(1) && right.awaitOne(0));
  }
}

/** A driver that writes anything anywhere into its rings, most of it nearly right. */
class Hostile {
 public:
  Hostile(NetRig& rig, uint32_t seed) : rig_(rig), random_(seed) {}

  void act() {
    const uint16_t queue = static_cast<uint16_t>(pick(rig_.queues));
    for (unsigned count = pick(16); count > 0; count--) describe(queue, static_cast<uint16_t>(pick(kRing)));
    for (unsigned count = pick(6); count > 0; count--) garble(queue, static_cast<uint16_t>(pick(kRing)));
    for (unsigned count = pick(6); count > 0; count--) {
      rig_.publish(queue, static_cast<uint16_t>(rarely() ? pick(70) : pick(kRing)));
    }
    if (rarely()) rig_.memory[queue * NetRig::kPart + pick(3 * 4096)] = static_cast<uint8_t>(random_());
    while (rig_.collect(queue)) {
    }
    signalFd(rig_.function->doorbell(queue));
  }
  unsigned pick(unsigned limit) { return static_cast<unsigned>(random_() % limit); }

 private:
  bool rarely() { return pick(300) == 0; }

  void describe(uint16_t queue, uint16_t index) {
    const uint64_t base = kIova + queue * NetRig::kPart + NetRig::kBuffers;
    uint64_t address = base + index * NetRig::kBuffer;
    const uint32_t lengths[] = {60, 72, 1514, 2048, 11, 12, 13, 25, 26, 1, 0, 66000, 1 << 20, UINT32_MAX};
    uint32_t length = lengths[pick(pick(4) == 0 ? 14 : 4)];
    uint16_t flags = queue % 2 == 0 ? 2 : 0;
    if (queue == rig_.queues - 1) {
      length = pick(4) == 0 ? length : 4;
      flags = index % 2 == 0 ? 1 : 2;
    }
    if (pick(6) == 0) flags |= 1;
    if (pick(30) == 0) flags ^= 2;
    if (pick(60) == 0) {
      const uint64_t places[] = {random_(), UINT64_MAX - pick(64), kIova + rig_.queues * NetRig::kPart - pick(256), kIova};
      address = places[pick(4)];
    }
    rig_.describe(queue, index, address, length, flags, static_cast<uint16_t>(rarely() ? random_() : (index + 1) % kRing));
  }

  /** Headers and commands. */
  void garble(uint16_t queue, uint16_t slot) {
    uint8_t* at = rig_.buffer(queue, slot);
    if (queue == rig_.queues - 1) {
      const uint8_t commands[][4] = {{4, 0, 1, 0}, {4, 0, 2, 0}, {4, 0, 9, 9}, {0, 0, 1, 0}, {0, 0, 0, 0}, {1, 1, 1, 1}};
      memcpy(at, commands[pick(6)], 4);
    } else {
      for (unsigned index = 0; index < sizeof(NetHeader); index++) at[index] = pick(3) == 0 ? random_() : pick(4);
    }
  }

  NetRig& rig_;
  std::minstd_rand random_;
};

TEST(net_survives_a_hostile_driver) {
  const uint64_t offloads = 1ull << 0 | 1ull << 1 | 1ull << 7 | 1ull << 8 | 1ull << 11 | 1ull << 12;
  const uint64_t words[] = {kNetFeatures | kControl, kNetFeatures | kControl | kMergeable | offloads, kNetFeatures | offloads};
  uint32_t seed = 1;
  for (const uint64_t features : words) {
    for (const bool wire : {false, true}) {
      const Parameters parameters = {{"backend", std::string(wire ? "wire" : "echo")}, {"wire", std::string("hostile")}};
      NetRig rig(parameters, features, 2), peer(parameters, kNetFeatures, 2);
      Hostile hostile(rig, seed), mate(peer, seed + 100);
      seed++;
      for (int round = 0; round < 40; round++) {
        rig.start();
        peer.start();
        for (int action = 0; action < 60; action++) {
          hostile.act();
          mate.act();
          if (hostile.pick(8) == 0) usleep(50);
        }
        rig.stop(round % 2 == 0 ? Stop::drop : Stop::finish);
        peer.stop();
        CHECK(rig.function->inFlight() == 0);
      }
      CHECK(rig.function->stats(1).completed > 0 && rig.function->stats(1).bad > 0);
      memset(rig.memory, 0, 3 * 4096);
      memset(rig.memory + NetRig::kPart, 0, 3 * 4096);
    }
  }
}

}  // namespace
