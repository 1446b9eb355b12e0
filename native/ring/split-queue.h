#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "chain.h"
#include "dirty-log.h"
#include "dma-table.h"
#include "file.h"

namespace vhostd::ring {

/** A split virtqueue as the driver has set it up. Addresses are IOVAs. */
struct QueueConfig {
  uint16_t size = 0;
  uint64_t desc = 0;
  uint64_t driver = 0;
  uint64_t device = 0;
  uint16_t lastAvail = 0;
  uint16_t lastUsed = 0;
  /** Heads of chains that were taken before `lastAvail` and not given back. */
  std::vector<uint16_t> inFlight;
};

enum class Pop { empty, chain, broken };

/**
 * The device side of a split virtqueue (VIRTIO 1.2, 2.7). Nothing that is read from the ring is trusted; what cannot be
 * right is `broken` with a reason. Memory that has gone away is broken too.
 */
class SplitQueue {
 public:
  /** Empty, or what is wrong with the configuration: size, alignment, a part that is not mapped, indices, heads. */
  static std::string check(const QueueConfig& config, const DmaTable& dma);

  /** `config` has been checked against `dma` in the same turn. */
  void activate(const QueueConfig& config, const DmaTable& dma, bool indirect, bool eventIdx);
  void deactivate() { active_ = false; }
  /** Where it notes what it writes, from now on; nullptr for nowhere. Stays until it is replaced. */
  void track(DirtyLog* log) { log_ = log; }
  bool active() const { return active_; }
  /** A part of the ring lies in [iova, iova + size). */
  bool uses(uint64_t iova, uint64_t size) const;

  /** Reads the next of the chains that were in flight when the ring was activated; empty when all have been. */
  Pop popAgain(const DmaTable& dma, Chain& chain, std::string& reason);
  /**
   * Takes the next available chain. `reason` is set where the ring is broken; it is, too, where the driver has made more
   * available than the ring has entries since what it was shown as used.
   */
  Pop pop(const DmaTable& dma, Chain& chain, std::string& reason);
  /** Undoes `pop` or `popAgain`: of the chains that were taken since another was pushed, the last one. */
  void putBack(const Chain& chain);
  /** Whether `popAgain` has one. */
  bool owesAgain() const { return readAgain_ < config_.inFlight.size(); }
  /** Gives a chain back with `written` bytes; the driver sees it after `publish`. */
  void push(uint16_t head, uint32_t written);
  /** The chain is no longer in flight and is never given back. */
  void forget(uint16_t head);
  /** Writes what was pushed, which nobody looks at before `publish`. False where the ring's memory is gone. */
  bool store();
  /** Shows the driver what was pushed. False where the ring's memory is gone; `call` says whether it wants a call. */
  bool publish(bool& call);

  /** No notifications are needed while the device looks at the ring anyway. False where the memory is gone. */
  bool disarm();
  /**
   * Asks for a notification of the next chain that was not seen yet; `more` where one is there already. False where the
   * memory is gone.
   */
  bool arm(bool& more);

  /** Heads of chains that were taken and neither given back nor forgotten, in the order they were taken. */
  std::vector<uint16_t> inFlight() const;
  uint16_t lastAvail() const { return lastAvail_; }
  uint16_t lastUsed() const { return lastUsed_; }

 private:
  struct Descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags;
    uint16_t next;
  };
  struct UsedElement {
    uint32_t id;
    uint32_t length;
  };
  /** The next available chain's head, and its first descriptor where there is such a head. */
  struct Ahead {
    uint16_t head;
    Descriptor first;
  };
  /** Together: a cache line of the available ring. Their buffers are fetched so many chains before they are needed. */
  static constexpr uint16_t kAhead = 32;
  static constexpr uint16_t kBuffersAhead = 5;

  void storeElements();
  void noteElements();
  void note(uint64_t offset, uint64_t length);
  bool isAhead() const { return static_cast<uint16_t>(lastAvail_ - aheadFrom_) < aheadCount_; }
  bool readAhead(const DmaTable& dma, std::string& reason);
  void prefetch(const DmaTable& dma, const Ahead& chain) const;
  bool checkHead(uint16_t head, std::string& reason) const;
  bool readChain(const DmaTable& dma, uint16_t head, Chain& chain, std::string& reason);
  bool readDirect(uint16_t head, std::string& reason);
  static bool isLast(const Descriptor& descriptor);
  std::string refusal(const Descriptor& table, uint16_t head) const;
  bool readIndirect(const DmaTable& dma, const Descriptor& table, Chain& chain, std::string& reason);

  bool active_ = false;
  DirtyLog* log_ = nullptr;
  bool indirect_ = false;
  bool eventIdx_ = false;
  QueueConfig config_;
  const Descriptor* desc_ = nullptr;
  /** flags, idx, ring[size], used_event */
  uint16_t* avail_ = nullptr;
  /** flags, idx */
  uint16_t* usedHead_ = nullptr;
  UsedElement* usedRing_ = nullptr;
  uint16_t* availEvent_ = nullptr;

  uint16_t lastAvail_ = 0;
  /** The driver's index as last seen. */
  uint16_t availIndex_ = 0;
  uint16_t lastUsed_ = 0;
  /** What the driver has been shown. */
  uint16_t published_ = 0;
  bool disarmed_ = false;
  /** Read from the rings at once, from index `aheadFrom_` on; chains that are not taken yet do not change. */
  Ahead ahead_[kAhead];
  uint16_t aheadFrom_ = 0;
  uint16_t aheadCount_ = 0;
  /** Pushed, from index `published_` on; as many as the ring has entries at most. */
  std::vector<UsedElement> pushed_;
  /** Of these, in the ring. */
  size_t stored_ = 0;
  /** With the last one: the next will hardly need more of its buffer. */
  uint32_t lastWritten_ = 0;
  /** By head: when it was taken, counted from 1; 0 where it is not in flight. */
  std::vector<uint64_t> taken_;
  uint64_t takenCount_ = 0;
  /** Of `config_.inFlight`. */
  size_t readAgain_ = 0;
  /** The chain being read, as found in the descriptor table. */
  std::vector<Descriptor> direct_;
  size_t directCount_ = 0;
  std::vector<Descriptor> indirectTable_;
  std::vector<iovec> scratch_;
};

}  // namespace vhostd::ring
