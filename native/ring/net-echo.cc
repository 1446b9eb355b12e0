#include <algorithm>

#include "frame-queue.h"

namespace vhostd::ring {
namespace {

/** Sends each frame back to where it came from. */
class EchoPort final : public NetPort {
 public:
  explicit EchoPort(unsigned pairs) : queues_(pairs) {}

  bool carrier() const override { return true; }
  void start(uint64_t features) override { features_ = features; }
  void stop() override {
    for (FrameQueue& queue : queues_) queue.discard();
  }

  Sent send(unsigned pair, const std::vector<iovec>& parts, size_t total) override {
    FrameQueue& queue = queues_[pair];
    const Sent sent = queue.put(parts, total, features_);
    if (sent != Sent::sent) return sent;
    uint8_t* addresses = queue.last().frame;
    std::swap_ranges(addresses, addresses + kMacBytes, addresses + kMacBytes);
    queue.show();
    return sent;
  }
  bool peek(unsigned pair, NetFrame& frame, bool wake) override { return queues_[pair].peek(frame, wake); }
  void consume(unsigned pair) override { queues_[pair].take(); }

 private:
  std::vector<FrameQueue> queues_;
  uint64_t features_ = 0;
};

}  // namespace

std::unique_ptr<NetPort> createEchoPort(const NetPortOptions& options, std::string&) {
  return std::make_unique<EchoPort>(options.pairs);
}

}  // namespace vhostd::ring
