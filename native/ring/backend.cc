#include "backend.h"

#include <ctime>

namespace vhostd::ring {

int64_t monotonicNow() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1'000'000'000LL + now.tv_nsec;
}

namespace {

/** For functions without queues. */
class NoBackend final : public RingBackend {
 public:
  std::string set(const std::string&, const Parameter&) override { return "there are no parameters"; }
  std::string missing() const override { return {}; }
  void start(uint64_t) override {}
  void serve(Chain*, ServiceContext& context) override { context.fail("the function serves no requests"); }
};

}  // namespace

std::unique_ptr<RingBackend> createBackend(const std::string& name) {
  if (name == "none") return std::make_unique<NoBackend>();
  if (name == "blk") return createBlkBackend();
  if (name == "net") return createNetBackend();
  if (name == "forward") return createForwardBackend();
  return nullptr;
}

}  // namespace vhostd::ring
