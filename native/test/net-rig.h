#pragma once

#include <cstring>

#include "ring/net-header.h"
#include "test/ring-rig.h"

namespace vhostd::ring {

inline constexpr uint64_t kNetFeatures = 1ull << 32 | 1ull << 29 | 1ull << 28;

/** The driver's side of a network device of some pairs, and of its control queue. Each queue has a part of the memory. */
class NetRig {
 public:
  static constexpr size_t kPart = 1 << 18;
  /** In each part; each descriptor has a buffer of its own. */
  static constexpr size_t kBuffers = 1 << 14;
  static constexpr size_t kBuffer = 2048;

  NetRig(Parameters extra, uint64_t features = kNetFeatures, uint16_t pairs = 1)
      : queues(2 * pairs + 1), features_(features), size_(queues * kPart), file_(sizedMemfd(size_)), sides_(queues) {
    memory = static_cast<uint8_t*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_SHARED, file_, 0));
    call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    extra.merge(Parameters{{"pairs", int64_t{pairs}}, {"mac", std::string("02:00:00:00:00:01")}});
    function = RingFunction::create("net", extra, queues, reason);
    if (function) CHECK(function->map(kIova, size_, file_, 0, true) == 0);
  }
  ~NetRig() {
    function.reset();
    munmap(memory, size_);
    close(file_);
    close(call);
  }

  void start() {
    for (uint16_t queue = 0; queue < queues; queue++) {
      // What was taken and not given back is no more.
      Side& side = sides_[queue];
      side.available = side.seen = used(queue);
      halfWord(queue, kDriverPart + 2) = side.available;
      QueueConfig config;
      config.size = kRing;
      config.desc = kIova + queue * kPart;
      config.driver = config.desc + kDriverPart;
      config.device = config.desc + kDevicePart;
      config.lastAvail = config.lastUsed = side.available;
      CHECK(function->activate(queue, config, features_).empty());
      CHECK(function->setCall(queue, call));
    }
    CHECK(function->start(features_).empty());
  }
  void stop(Stop how = Stop::drop) {
    function->requestStop(how);
    CHECK(check::eventually([&] { return function->tryStop(1); }));
  }

  uint8_t* buffer(uint16_t queue, uint16_t slot) { return memory + queue * kPart + kBuffers + slot * kBuffer; }
  /** Of the next chain. */
  uint8_t* next(uint16_t queue) { return buffer(queue, sides_[queue].available % kRing); }
  /** All buffers are with the device. */
  bool full(uint16_t queue) const {
    return static_cast<uint16_t>(sides_[queue].available - sides_[queue].seen) == kRing;
  }
  /** The queue's next buffer, as one chain. */
  void offer(uint16_t queue, uint32_t length, bool writable) {
    const uint16_t slot = sides_[queue].available % kRing;
    describe(queue, slot, kIova + queue * kPart + kBuffers + slot * kBuffer, length, writable ? 2 : 0, 0);
    publish(queue, slot);
  }
  void describe(uint16_t queue, uint16_t index, uint64_t address, uint32_t length, uint16_t flags, uint16_t next) {
    uint8_t* at = memory + queue * kPart + 16 * index;
    memcpy(at, &address, 8);
    memcpy(at + 8, &length, 4);
    memcpy(at + 12, &flags, 2);
    memcpy(at + 14, &next, 2);
  }
  void publish(uint16_t queue, uint16_t head) {
    Side& side = sides_[queue];
    halfWord(queue, kDriverPart + 4 + 2 * (side.available % kRing)) = head;
    const uint16_t before = side.available++;
    __atomic_store_n(&halfWord(queue, kDriverPart + 2), side.available, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    const uint16_t event = __atomic_load_n(&halfWord(queue, kDevicePart + 4 + 8 * kRing), __ATOMIC_RELAXED);
    if (static_cast<uint16_t>(side.available - event - 1) < static_cast<uint16_t>(side.available - before)) {
      signalFd(function->doorbell(queue));
    }
  }
  /** The next completion, where there is one: its slot and its length. */
  bool collect(uint16_t queue, uint32_t& slot, uint32_t& length) {
    Side& side = sides_[queue];
    if (side.seen == used(queue)) return false;
    uint32_t element[2];
    memcpy(element, memory + queue * kPart + kDevicePart + 4 + 8 * (side.seen++ % kRing), sizeof element);
    slot = element[0];
    length = element[1];
    return true;
  }
  bool collect(uint16_t queue) {
    uint32_t slot, length;
    return collect(queue, slot, length);
  }
  bool awaitOne(uint16_t queue) {
    return check::eventually([&] { return collect(queue); });
  }
  uint16_t used(uint16_t queue) { return __atomic_load_n(&halfWord(queue, kDevicePart + 2), __ATOMIC_ACQUIRE); }

  /** A frame for transmission in the queue's next buffer: bytes count up from `first`. Its length with the header. */
  uint32_t write(uint16_t queue, uint32_t length, uint8_t first) {
    uint8_t* at = next(queue);
    memset(at, 0, sizeof(NetHeader));
    memset(at + sizeof(NetHeader), 0xff, kMacBytes);
    for (uint32_t index = kMacBytes; index < length; index++) {
      at[sizeof(NetHeader) + index] = static_cast<uint8_t>(first + index);
    }
    return static_cast<uint32_t>(sizeof(NetHeader)) + length;
  }
  /** A command to the control queue; what the device answers, or -1. */
  int command(std::initializer_list<uint8_t> bytes) {
    const uint16_t queue = queues - 1;
    // Two descriptors: the second is that of a slot that is not used at the same time.
    const uint16_t slot = sides_[queue].available % kRing;
    const uint16_t second = (slot + kRing / 2) % kRing;
    std::copy(bytes.begin(), bytes.end(), buffer(queue, slot));
    const uint64_t base = kIova + queue * kPart + kBuffers;
    describe(queue, slot, base + slot * kBuffer, static_cast<uint32_t>(bytes.size()), 1, second);
    describe(queue, second, base + second * kBuffer, 1, 2, 0);
    publish(queue, slot);
    return awaitOne(queue) ? *buffer(queue, second) : -1;
  }

  const uint16_t queues;
  std::unique_ptr<RingFunction> function;
  std::string reason;
  uint8_t* memory;
  int call;

 private:
  struct Side {
    uint16_t available = 0;
    uint16_t seen = 0;
  };
  uint16_t& halfWord(uint16_t queue, size_t at) { return *reinterpret_cast<uint16_t*>(memory + queue * kPart + at); }

  const uint64_t features_;
  const size_t size_;
  const int file_;
  std::vector<Side> sides_;
};

}  // namespace vhostd::ring
