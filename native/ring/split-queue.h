#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "chain.h"
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
  bool active() const { return active_; }
  /** A part of the ring lies in [iova, iova + size). */
  bool uses(uint64_t iova, uint64_t size) const;

  /** Reads the next of the chains that were in flight when the ring was activated; empty when all have been. */
  Pop popAgain(const DmaTable& dma, Chain& chain, std::string& reason);
  /** Takes the next available chain. `reason` is set where the ring is broken. */
  Pop pop(const DmaTable& dma, Chain& chain, std::string& reason);
  /** Gives a chain back with `written` bytes; the driver sees it after `publish`. False where the ring's memory is gone. */
  bool push(uint16_t head, uint32_t written);
  /** The chain is no longer in flight and is never given back. */
  void forget(uint16_t head);
  /** Shows the driver what was pushed. False where the ring's memory is gone; `call` says whether it wants a call. */
  bool publish(bool& call);

  /** No notifications are needed while the device looks at the ring anyway. False where the memory is gone. */
  bool disarm();
  /** Asks for a notification of the next chain; `more` where one is there already. False where the memory is gone. */
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
  bool nextHead(uint16_t& head, bool& empty, std::string& reason);
  bool readChain(const DmaTable& dma, uint16_t head, Chain& chain, std::string& reason);
  bool readDirect(uint16_t head, std::string& reason);
  bool readIndirect(const DmaTable& dma, const Descriptor& table, Chain& chain, std::string& reason);

  bool active_ = false;
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
