#include <cstring>
#include <memory>

#include "ring/backend.h"
#include "ring/net-header.h"
#include "test/check.h"

using namespace vhostd::ring;

namespace {

/** A worker with one pair, whose driver replaces a malformed receive chain as soon as it gets it back. */
class Endless final : public ServiceContext {
 public:
  /** A frame of the driver. */
  void transmit(RingBackend& backend) {
    Chain chain;
    chain.queue = 1;
    chain.readableSize = sizeof frame_;
    backend.serve(&chain, *this);
  }

  const std::vector<iovec>* vectors(const Chain&, Direction, uint64_t, uint64_t) override { return &parts_; }
  bool copyFrom(const Chain&, uint64_t, void*, size_t) override { return false; }
  bool copyTo(const Chain&, uint64_t, const void*, size_t) override { return false; }
  Chain* pull(uint16_t) override {
    // So that a test that fails ends.
    if (++taken > 10'000) return nullptr;
    // No room for a header.
    chain_.writableSize = 4;
    return &chain_;
  }
  void putBack(Chain*) override {}
  bool stocked(uint16_t) const override { return true; }
  void restock(uint16_t) override {}
  bool active(uint16_t queue) const override { return queue < 2; }
  bool polling() const override { return false; }
  bool pressed() const override { return taken >= pressedAfter; }
  void complete(Chain*, uint32_t, uint64_t, bool error) override { bad += error; }
  void abandon(Chain*) override {}
  void callControl() override {}
  void fail(std::string) override {}
  bool giveWay() override { return true; }
  void blocking(const std::function<void()>&) override {}

  unsigned taken = 0;
  unsigned bad = 0;
  unsigned pressedAfter = UINT32_MAX;

 private:
  uint8_t frame_[sizeof(NetHeader) + 60] = {};
  const std::vector<iovec> parts_{{frame_, sizeof frame_}};
  Chain chain_;
};

TEST(net_malformed_chains_do_not_keep_the_turn) {
  const std::unique_ptr<RingBackend> backend = createNetBackend();
  CHECK(backend->set("backend", std::string("echo")).empty() && backend->set("pairs", int64_t{1}).empty());
  CHECK(backend->open([] {}).empty());
  backend->start(1ull << 32);
  Endless driver;
  driver.transmit(*backend);
  CHECK(backend->poll(driver));
  CHECK(driver.taken == 64 && driver.bad == 64);
  driver.pressedAfter = driver.taken + 3;
  CHECK(backend->poll(driver));
  CHECK(driver.taken == 67);
}

}  // namespace
