#pragma once

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "ring/ring-function.h"
#include "test/check.h"

namespace vhostd::ring {

inline constexpr uint64_t kIova = 0x100000000;
inline constexpr uint64_t kMemory = 4 << 20;
inline constexpr uint64_t kDisk = 1 << 20;
inline constexpr uint16_t kRing = 64;
inline constexpr uint64_t kFeatures = 1ull << 32 | 1ull << 29 | 1ull << 28 | 1ull << 9;
inline constexpr size_t kSector = 512;
/** In `memory`. */
inline constexpr size_t kDriverPart = 4096;
inline constexpr size_t kDevicePart = 8192;
inline constexpr size_t kHeaders = 65536;

inline int sizedMemfd(uint64_t size) {
  int fd = memfd_create("ring-test", MFD_CLOEXEC);
  (void)!ftruncate(fd, static_cast<off_t>(size));
  return fd;
}

inline void signalFd(int fd) {
  const uint64_t one = 1;
  (void)!write(fd, &one, sizeof one);
}

/** A function with two queues and the driver's side of the first one, through a mapping of its own. */
class Rig {
 public:
  /** @param first where both indices begin */
  explicit Rig(Parameters extra = {}, std::string worker = "blk", uint16_t first = 0)
      : disk(sizedMemfd(kDisk)), file(sizedMemfd(kMemory)), available(first), backend(std::move(worker)) {
    memory = static_cast<uint8_t*>(mmap(nullptr, kMemory, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
    halfWord(kDriverPart + 2) = halfWord(kDevicePart + 2) = first;
    if (backend == "blk") {
      parameters = {{"fd", int64_t{disk}}, {"capacity", int64_t{kDisk}}, {"maxRanges", int64_t{4}},
                    {"maxRangeSectors", int64_t{1024}}};
      parameters.merge(extra);
    }
    call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    create();
  }
  ~Rig() {
    function.reset();
    munmap(memory, kMemory);
    for (int fd : {disk, file, call}) close(fd);
  }

  /** A new function in the place of the old one, on the same memory and the same disk. */
  void create() {
    std::string reason;
    function = RingFunction::create(backend, parameters, 2, reason);
    CHECK(reason.empty());
    CHECK(function->map(kIova, kMemory, file, 0, true) == 0);
    CHECK(function->setCall(0, call));
  }
  static QueueConfig config(uint16_t lastAvail = 0, uint16_t lastUsed = 0) {
    QueueConfig config;
    config.size = kRing;
    config.desc = kIova;
    config.driver = kIova + kDriverPart;
    config.device = kIova + kDevicePart;
    config.lastAvail = lastAvail;
    config.lastUsed = lastUsed;
    return config;
  }
  void start() { start(config(available, available)); }
  void start(const QueueConfig& config) {
    CHECK(function->activate(0, config, kFeatures).empty());
    CHECK(function->start(kFeatures).empty());
  }
  void stop(bool drain) {
    function->requestStop(drain ? Stop::finish : Stop::drop);
    CHECK(check::eventually([&] { return function->tryStop(1); }));
  }
  void park() {
    function->requestStop(Stop::park);
    CHECK(check::eventually([&] { return function->tryPark(1); }));
  }

  /** Request number `slot` with one sector of data; its header, data and status have places of their own. */
  void put(uint16_t slot, uint32_t type, uint64_t sector, uint64_t data) {
    const uint64_t at = kHeaders + slot * 64;
    memcpy(memory + at, &type, 4);
    memcpy(memory + at + 8, &sector, 8);
    memory[at + 16] = 0xff;
    const uint16_t first = slot * 3;
    describe(first, kIova + at, 16, 1, first + 1);
    describe(first + 1, data, kSector, 1 | (type == 0 ? 2 : 0), first + 2);
    describe(first + 2, kIova + at + 16, 1, 2, 0);
    offer(first);
  }
  void describe(uint16_t index, uint64_t address, uint32_t length, uint16_t flags, uint16_t next) {
    uint8_t* at = memory + 16 * index;
    memcpy(at, &address, 8);
    memcpy(at + 8, &length, 4);
    memcpy(at + 12, &flags, 2);
    memcpy(at + 14, &next, 2);
  }
  void offer(uint16_t head) {
    halfWord(kDriverPart + 4 + 2 * (available % kRing)) = head;
    const uint16_t before = available++;
    __atomic_store_n(&halfWord(kDriverPart + 2), available, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    const uint16_t event = __atomic_load_n(&halfWord(kDevicePart + 4 + 8 * kRing), __ATOMIC_RELAXED);
    if (static_cast<uint16_t>(available - event - 1) >= static_cast<uint16_t>(available - before)) return;
    signalFd(kick >= 0 ? kick.load() : function->doorbell(0));
  }
  uint16_t used() const { return __atomic_load_n(&halfWord(kDevicePart + 2), __ATOMIC_ACQUIRE); }
  /** Head and length of a completion. */
  std::pair<uint32_t, uint32_t> usedElement(uint16_t index) const {
    uint32_t element[2];
    memcpy(element, memory + kDevicePart + 4 + 8 * (index % kRing), sizeof element);
    return {element[0], element[1]};
  }
  uint8_t status(uint16_t slot) const { return memory[kHeaders + slot * 64 + 16]; }
  /** Waits for `count` completions by calls alone: a call that is left out wrongly is a hang. */
  bool awaitUsed(uint16_t count) {
    for (;;) {
      __atomic_store_n(&halfWord(kDriverPart + 4 + 2 * kRing), static_cast<uint16_t>(count - 1), __ATOMIC_RELAXED);
      __atomic_thread_fence(__ATOMIC_SEQ_CST);
      if (static_cast<int16_t>(used() - count) >= 0) return true;
      pollfd ready = {call, POLLIN, 0};
      if (poll(&ready, 1, 10000) != 1) return false;
      uint64_t value;
      (void)!read(call, &value, sizeof value);
    }
  }

  int disk;
  int file;
  int call;
  uint8_t* memory;
  uint16_t available;
  std::unique_ptr<RingFunction> function;
  /** Where the driver notifies; -1 for the function's doorbell. */
  std::atomic<int> kick{-1};

 private:
  uint16_t& halfWord(size_t at) const { return *reinterpret_cast<uint16_t*>(memory + at); }

  std::string backend;
  Parameters parameters;
};

}  // namespace vhostd::ring
