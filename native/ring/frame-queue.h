#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "net-port.h"

namespace vhostd::ring {

/**
 * A bounded queue of frames in process memory, between one thread that puts and one that takes: neither waits for the
 * other, and what was put is shown in batches.
 */
class FrameQueue {
 public:
  FrameQueue();

  /**
   * Copies a header and a frame of `total` bytes out of a driver's memory, as a driver with `features` may send them.
   * They are not seen before `show`.
   */
  Sent put(const std::vector<iovec>& parts, size_t total, uint64_t features);
  /** The one that was just put. */
  NetFrame last() const { return frameAt(putAt_); }
  /** True where the taker waits and is to be woken. */
  bool show();

  /** The oldest, if any. Where not, and it is to `wake`, `show` says so when there is one again. */
  bool peek(NetFrame& frame, bool wake);
  /** Removes it. */
  void take();
  /** Removes all, by the taker. */
  void discard();

 private:
  /** Bytes; a power of two. Two rings of 256 frames of the usual MTU, and more of small ones. */
  static constexpr uint64_t kCapacity = 1 << 20;
  /** Records begin at multiples. */
  static constexpr uint64_t kAlignment = 16;
  /** In the place of a length: the next record is at the beginning. */
  static constexpr uint32_t kWrap = UINT32_MAX;
  struct Record {
    /** Of the header and the frame, bytes. */
    uint32_t total;
    NetHeader header;
  };
  static_assert(sizeof(Record) == kAlignment);

  Record* recordAt(uint64_t position) const {
    return reinterpret_cast<Record*>(memory_.get() + (position & (kCapacity - 1)));
  }
  NetFrame frameAt(uint64_t position) const;
  static uint64_t room(size_t total);
  uint64_t knownTaken() const;
  bool isEmpty() const;
  bool findRoom(uint64_t end);

  struct Free {
    void operator()(uint8_t* memory) const;
  };
  /** Not touched before it is needed. */
  std::unique_ptr<uint8_t, Free> memory_;

  /** The putter's: where the last record is, the next will be, and what it knows of the taker. */
  alignas(64) uint64_t putAt_ = 0;
  uint64_t tail_ = 0;
  uint64_t knownHead_ = 0;
  /** The taker's. */
  alignas(64) uint64_t head_ = 0;
  uint64_t knownTail_ = 0;
  /** Bytes that were put and taken since the beginning. */
  alignas(64) std::atomic<uint64_t> shown_{0};
  /** Where the putter has begun anew when all was taken: the oldest that is left is there or further on. */
  std::atomic<uint64_t> begin_{0};
  std::atomic<bool> awaited_{true};
  alignas(64) std::atomic<uint64_t> taken_{0};
};

}  // namespace vhostd::ring
