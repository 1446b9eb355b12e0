#include "test/check.h"
#include "test/net-rig.h"

using namespace vhostd::ring;

namespace {

/** Two functions on one wire, with drivers that are turned away while the link is down. */
class Couple {
 public:
  explicit Couple(const std::string& wire) : left_(parameters(wire)), right_(parameters(wire)) {}

  NetRig& end(int side) { return side == 0 ? left_ : right_; }
  bool link(int side) { return end(side).function->carrier(); }
  /** As a new driver, which is welcome with or without a link. */
  void start(int side) { end(side).start(); }
  /** As one that was turned away. */
  bool comeBack(int side) {
    if (!check::eventually([&] { return link(side); })) return false;
    start(side);
    return true;
  }
  bool connected() {
    if (!check::eventually([&] { return link(0) && link(1); })) return false;
    for (const int from : {0, 1}) {
      NetRig& to = end(1 - from);
      to.offer(0, NetRig::kBuffer, true);
      // What was sent before the other end ran has gone nowhere.
      const bool arrived = check::eventually([&] {
        end(from).offer(1, end(from).write(1, 60, 0), false);
        return end(from).awaitOne(1) && to.collect(0);
      });
      if (!arrived) return false;
    }
    return true;
  }

 private:
  static Parameters parameters(const std::string& wire) {
    return {{"backend", std::string("wire")}, {"wire", wire}};
  }
  NetRig left_, right_;
};

TEST(wire_end_that_was_cut_off_comes_back_when_the_other_has_a_new_driver) {
  Couple couple("widow");
  couple.start(0);
  couple.start(1);
  CHECK(couple.connected());
  // One is killed; the other's link is down, so it is turned away.
  couple.end(0).stop();
  CHECK(!couple.link(1));
  couple.end(1).stop();
  CHECK(couple.link(0) && !couple.link(1));
  couple.start(0);
  CHECK(couple.comeBack(1) && couple.connected());
}

TEST(wire_ends_that_stop_together_find_each_other) {
  for (const int firstToStop : {0, 1}) {
    for (const int firstToStart : {0, 1}) {
      Couple couple("pair");
      couple.start(0);
      couple.start(1);
      CHECK(couple.connected());
      couple.end(firstToStop).stop();
      couple.end(1 - firstToStop).stop();
      couple.start(firstToStart);
      CHECK(couple.comeBack(1 - firstToStart));
      // Whose link was down then has been turned away.
      if (firstToStart != firstToStop) {
        couple.end(firstToStart).stop();
        CHECK(couple.comeBack(firstToStart));
      }
      CHECK(couple.connected());
    }
  }
}

/** Before the other was there, and before the worker had a turn. */
TEST(wire_end_that_was_alone_is_found) {
  Couple couple("alone");
  couple.start(0);
  couple.end(0).stop();
  CHECK(couple.link(1));
  couple.start(1);
  CHECK(couple.comeBack(0) && couple.connected());
}

TEST(wire_end_whose_driver_has_left_is_off) {
  Couple couple("left");
  couple.start(0);
  couple.end(0).stop();
  CHECK(couple.link(1));
  couple.end(0).function->unmapAll();
  CHECK(!couple.link(1));
}

TEST(wire_end_stays_on_while_the_cable_is_pulled) {
  Couple couple("cable");
  couple.start(0);
  couple.start(1);
  CHECK(couple.connected());
  couple.end(0).function->configure({{"link", false}});
  CHECK(!couple.link(1));
  couple.end(1).stop();
  couple.end(0).stop();
  couple.end(0).function->configure({{"link", true}});
  CHECK(couple.link(0) && couple.link(1));
  CHECK(couple.comeBack(0) && couple.comeBack(1) && couple.connected());
}

TEST(wire_holds_two_rings_of_frames_of_the_usual_mtu) {
  Couple couple("deep");
  couple.start(0);
  couple.start(1);
  CHECK(couple.connected());
  NetRig& sender = couple.end(0);
  const int64_t before = sender.function->info()["dropped"];
  for (int count = 0; count < 2 * 256; count++) {
    sender.offer(1, sender.write(1, 1514, 0), false);
    CHECK(sender.awaitOne(1));
  }
  CHECK(sender.function->info()["dropped"] == before);
  NetRig& receiver = couple.end(1);
  for (int count = 0; count < 2 * 256; count++) {
    receiver.offer(0, NetRig::kBuffer, true);
    CHECK(receiver.awaitOne(0));
  }
}

}  // namespace
