#include <cstring>
#include <vector>

#include "ring/split-queue.h"
#include "test/check.h"

using namespace vhostd::ring;

namespace {

/** A driver that makes its chain available again and again without waiting for it. */
TEST(ring_gives_back_no_more_than_the_ring_has_before_the_driver_sees_it) {
  constexpr uint64_t kIova = 1 << 20;
  constexpr uint64_t kPart = 1 << 19;
  for (const uint32_t size : {4u, 32768u}) {
    std::vector<uint64_t> memory(3 * kPart / sizeof(uint64_t));
    DmaMapping mapping;
    mapping.iova = kIova;
    mapping.size = 3 * kPart;
    mapping.host = reinterpret_cast<uint8_t*>(memory.data());
    mapping.writable = true;
    DmaTable dma;
    CHECK(dma.insert(mapping) == 0);
    QueueConfig config;
    config.size = static_cast<uint16_t>(size);
    config.desc = kIova;
    config.driver = kIova + kPart;
    config.device = kIova + 2 * kPart;
    CHECK(SplitQueue::check(config, dma).empty());
    SplitQueue queue;
    queue.activate(config, dma, false, false);
    uint16_t* available = reinterpret_cast<uint16_t*>(mapping.host + kPart);
    uint16_t* used = reinterpret_cast<uint16_t*>(mapping.host + 2 * kPart);
    Chain chain;
    std::string reason;
    const auto takes = [&](uint32_t count) {
      for (uint32_t taken = 0; taken < count; taken++) {
        available[1]++;
        if (queue.pop(dma, chain, reason) != Pop::chain) return taken;
        queue.push(chain.head, 0);
      }
      return count;
    };
    bool call;
    CHECK(takes(size) == size);
    CHECK(queue.publish(call) && used[1] == size);
    CHECK(takes(65536) == size);
    CHECK(reason.find("ahead of used index " + std::to_string(size)) != std::string::npos);
    CHECK(queue.publish(call) && used[1] == static_cast<uint16_t>(2 * size));
  }
}

}  // namespace
