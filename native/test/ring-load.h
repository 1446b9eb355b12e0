#pragma once

#include <atomic>
#include <cstring>
#include <thread>

#include "test/ring-rig.h"

namespace vhostd::ring {

/**
 * A driver on a thread of its own that keeps a rig's first queue busy: each slot writes its sector with new contents
 * and reads it back, again and again. Counts what should not be: a chain that comes back twice or was never sent, a bad
 * status, other contents than were written. It waits by calls alone.
 */
class Load {
 public:
  explicit Load(Rig& rig) : rig_(rig), seen_(rig.available), thread_([this] { run(); }) {}
  ~Load() { finish(); }

  uint64_t completed() const { return completed_; }
  /** Waits for what is under way. True where all came back and all was right. */
  bool finish() {
    ending_ = true;
    if (thread_.joinable()) thread_.join();
    return wrong_ == 0;
  }

 private:
  static constexpr uint16_t kSlots = 16;
  static constexpr size_t kData = 1 << 20;
  enum class Phase { idle, writing, reading };
  struct Slot {
    Phase phase = Phase::idle;
    uint8_t contents = 0;
  };

  uint8_t* data(uint16_t slot) { return rig_.memory + kData + slot * kSector; }

  void run() {
    int outstanding = 0;
    while (!ending_ || outstanding > 0) {
      for (uint16_t slot = 0; slot < kSlots && !ending_; slot++) {
        if (slots_[slot].phase != Phase::idle) continue;
        slots_[slot].phase = Phase::writing;
        memset(data(slot), ++slots_[slot].contents, kSector);
        rig_.put(slot, 1, slot, kIova + kData + slot * kSector);
        outstanding++;
      }
      if (!rig_.awaitUsed(seen_ + 1)) {
        wrong_++;
        return;
      }
      while (seen_ != rig_.used()) {
        if (!take(rig_.usedElement(seen_++).first)) outstanding--;
        completed_++;
      }
    }
  }

  /** True where the slot goes on with another request. */
  bool take(uint32_t head) {
    const uint16_t index = static_cast<uint16_t>(head / 3);
    if (head % 3 != 0 || index >= kSlots || slots_[index].phase == Phase::idle) {
      wrong_++;
      return true;
    }
    Slot& slot = slots_[index];
    if (rig_.status(index) != 0) wrong_++;
    if (slot.phase == Phase::writing) {
      slot.phase = Phase::reading;
      memset(data(index), 0, kSector);
      rig_.put(index, 0, index, kIova + kData + index * kSector);
      return true;
    }
    if (data(index)[0] != slot.contents || data(index)[kSector - 1] != slot.contents) wrong_++;
    slot.phase = Phase::idle;
    return false;
  }

  Rig& rig_;
  Slot slots_[kSlots];
  uint16_t seen_;
  std::atomic<uint64_t> completed_{0};
  std::atomic<int> wrong_{0};
  std::atomic<bool> ending_{false};
  std::thread thread_;
};

}  // namespace vhostd::ring
