#include "split-queue.h"

#include <algorithm>
#include <cstring>

#include "../guard.h"
#include "prefetch.h"

namespace vhostd::ring {
namespace {

constexpr uint16_t kNext = 1;
constexpr uint16_t kWrite = 2;
constexpr uint16_t kIndirect = 4;
constexpr uint16_t kNoInterrupt = 1;
constexpr uint16_t kNoNotify = 1;
constexpr uint32_t kLargestRing = 32768;
/** Drivers fill indirect tables beyond the ring size (VIRTIO 1.2, 2.7.5.3.1 forbids it, Linux does it). */
constexpr uint32_t kIndirectEntries = 1024;
/** Of a buffer, bytes: a frame of the usual MTU with its headers. */
constexpr uint32_t kMostPrefetched = 1600;

/** Where things are in the used ring: flags, idx, the elements. */
constexpr uint64_t kUsedIndex = 2;
constexpr uint64_t kUsedHead = 4;

uint64_t descBytes(uint64_t entries) { return 16 * entries; }
uint64_t availBytes(uint64_t entries) { return 6 + 2 * entries; }
uint64_t usedBytes(uint64_t entries) { return 6 + 8 * entries; }

std::string hex(uint64_t value) {
  char text[24];
  snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string nameOf(uint16_t head) { return "chain " + std::to_string(head); }

/** vring_need_event (VIRTIO 1.2, 2.7.7.1). */
bool passed(uint16_t event, uint16_t now, uint16_t before) {
  return static_cast<uint16_t>(now - event - 1) < static_cast<uint16_t>(now - before);
}

/** Chains that were taken and not given back are those between the two indices. */
std::string checkInFlight(const QueueConfig& config) {
  const uint16_t ahead = config.lastAvail - config.lastUsed;
  if (ahead > config.size) {
    return "available index " + std::to_string(config.lastAvail) + " is " + std::to_string(ahead) +
           " ahead of used index " + std::to_string(config.lastUsed) + ", the ring has " + std::to_string(config.size);
  }
  if (config.inFlight.size() > ahead) {
    return std::to_string(config.inFlight.size()) + " chains are in flight, by the indices " + std::to_string(ahead);
  }
  std::vector<bool> seen(config.size);
  for (const uint16_t head : config.inFlight) {
    if (head >= config.size) {
      return "head in flight " + std::to_string(head) + " is outside the ring of " + std::to_string(config.size);
    }
    if (seen[head]) return "head " + std::to_string(head) + " is in flight twice";
    seen[head] = true;
  }
  return {};
}

bool overlaps(uint64_t one, uint64_t oneSize, uint64_t other, uint64_t otherSize) {
  return one < other + otherSize && other < one + oneSize;
}

}  // namespace

std::string SplitQueue::check(const QueueConfig& config, const DmaTable& dma) {
  const uint32_t size = config.size;
  if (size == 0 || size > kLargestRing || (size & (size - 1)) != 0) {
    return "ring size " + std::to_string(size) + " is not a power of two up to 32768";
  }
  const struct {
    const char* name;
    uint64_t at, bytes, alignment;
    bool writable;
  } parts[] = {{"descriptor table", config.desc, descBytes(size), 16, false},
               {"available ring", config.driver, availBytes(size), 2, false},
               {"used ring", config.device, usedBytes(size), 4, true}};
  for (const auto& part : parts) {
    if (part.at % part.alignment != 0) {
      return std::string(part.name) + " at " + hex(part.at) + " is not aligned to " + std::to_string(part.alignment);
    }
    if (dma.contiguous(part.at, part.bytes, part.writable) == nullptr) {
      return std::string(part.name) + " at " + hex(part.at) + "+" + hex(part.bytes) + " is not in one mapped range";
    }
  }
  return checkInFlight(config);
}

void SplitQueue::activate(const QueueConfig& config, const DmaTable& dma, bool indirect, bool eventIdx) {
  const uint32_t size = config.size;
  config_ = config;
  indirect_ = indirect;
  eventIdx_ = eventIdx;
  desc_ = reinterpret_cast<const Descriptor*>(dma.contiguous(config.desc, descBytes(size), false));
  avail_ = reinterpret_cast<uint16_t*>(dma.contiguous(config.driver, availBytes(size), false));
  usedHead_ = reinterpret_cast<uint16_t*>(dma.contiguous(config.device, usedBytes(size), true));
  usedRing_ = reinterpret_cast<UsedElement*>(usedHead_ + 2);
  availEvent_ = reinterpret_cast<uint16_t*>(usedRing_ + size);
  lastAvail_ = availIndex_ = config.lastAvail;
  lastUsed_ = published_ = config.lastUsed;
  disarmed_ = false;
  taken_.assign(size, 0);
  takenCount_ = 0;
  for (const uint16_t head : config.inFlight) taken_[head] = ++takenCount_;
  readAgain_ = 0;
  aheadCount_ = 0;
  pushed_.clear();
  stored_ = 0;
  pushed_.reserve(size);
  lastWritten_ = 0;
  direct_.resize(size);
  indirectTable_.resize(std::max(size, kIndirectEntries));
  active_ = true;
}

bool SplitQueue::uses(uint64_t iova, uint64_t size) const {
  return active_ && (overlaps(iova, size, config_.desc, descBytes(config_.size)) ||
                     overlaps(iova, size, config_.driver, availBytes(config_.size)) ||
                     overlaps(iova, size, config_.device, usedBytes(config_.size)));
}

Pop SplitQueue::popAgain(const DmaTable& dma, Chain& chain, std::string& reason) {
  if (readAgain_ == config_.inFlight.size()) return Pop::empty;
  const uint16_t head = config_.inFlight[readAgain_++];
  if (!readDirect(head, reason) || !readChain(dma, head, chain, reason)) return Pop::broken;
  chain.again = true;
  return Pop::chain;
}

Pop SplitQueue::pop(const DmaTable& dma, Chain& chain, std::string& reason) {
  if (!isAhead() && !readAhead(dma, reason)) return Pop::broken;
  if (lastAvail_ == availIndex_) return Pop::empty;
  const uint16_t at = lastAvail_ - aheadFrom_;
  const Ahead& next = ahead_[at];
  if (!checkHead(next.head, reason)) return Pop::broken;
  if (at + kBuffersAhead < aheadCount_) prefetch(dma, ahead_[at + kBuffersAhead]);
  if (isLast(next.first)) {
    direct_[0] = next.first;
    directCount_ = 1;
  } else if (!readDirect(next.head, reason)) {
    return Pop::broken;
  }
  if (!readChain(dma, next.head, chain, reason)) return Pop::broken;
  taken_[next.head] = ++takenCount_;
  lastAvail_++;
  chain.again = false;
  return Pop::chain;
}

void SplitQueue::putBack(const Chain& chain) {
  if (chain.again) {
    readAgain_--;
    return;
  }
  taken_[chain.head] = 0;
  lastAvail_--;
}

/** Of the descriptors in `direct_`. */
bool SplitQueue::readChain(const DmaTable& dma, uint16_t head, Chain& chain, std::string& reason) {
  chain.clear();
  chain.head = head;
  const auto add = [&chain](const Descriptor& descriptor) {
    if (descriptor.length == 0) return;
    if (descriptor.flags & kWrite) {
      chain.writable.push_back({descriptor.address, descriptor.length});
      chain.writableSize += descriptor.length;
    } else {
      if (chain.writableSize != 0) chain.misordered = true;
      chain.readable.push_back({descriptor.address, descriptor.length});
      chain.readableSize += descriptor.length;
    }
  };
  const Descriptor& last = direct_[directCount_ - 1];
  const bool viaTable = (last.flags & kIndirect) != 0;
  for (size_t index = 0; index < directCount_ - (viaTable ? 1 : 0); index++) add(direct_[index]);
  if (viaTable) {
    if (!readIndirect(dma, last, chain, reason)) return false;
    const uint32_t entries = last.length / sizeof(Descriptor);
    uint32_t at = 0;
    for (uint32_t count = 1;; count++) {
      const Descriptor& descriptor = indirectTable_[at];
      if (descriptor.flags & kIndirect) {
        reason = nameOf(head) + " has an indirect table inside an indirect table";
        return false;
      }
      add(descriptor);
      if ((descriptor.flags & kNext) == 0) break;
      at = descriptor.next;
      if (at >= entries) {
        reason = "indirect table of " + nameOf(head) + " links to entry " + std::to_string(at) + " of " +
                 std::to_string(entries);
        return false;
      }
      if (count == entries) {
        reason = "indirect table of " + nameOf(head) + " loops";
        return false;
      }
    }
  }
  return true;
}

/** Reads what is available, at most `kAhead`; nothing where there is nothing. */
bool SplitQueue::readAhead(const DmaTable& dma, std::string& reason) {
  const uint16_t size = config_.size;
  uint16_t count = 0;
  const bool readable = guarded([&] {
    if (availIndex_ == lastAvail_) availIndex_ = __atomic_load_n(avail_ + 1, __ATOMIC_ACQUIRE);
    count = std::min<uint16_t>(availIndex_ - lastAvail_, kAhead);
    // Each is in a cache of the driver's processor: they are fetched side by side.
    for (uint16_t index = 0; index < count; index++) {
      const uint16_t head = __atomic_load_n(avail_ + 2 + (lastAvail_ + index) % size, __ATOMIC_RELAXED);
      ahead_[index].head = head;
      if (head < size) __builtin_prefetch(desc_ + head);
    }
    for (uint16_t index = 0; index < count; index++) {
      const uint16_t head = ahead_[index].head;
      if (head < size) memcpy(&ahead_[index].first, desc_ + head, sizeof(Descriptor));
    }
  });
  aheadFrom_ = lastAvail_;
  aheadCount_ = 0;
  if (!readable) {
    reason = "memory of the available ring or the descriptor table is gone";
    return false;
  }
  const uint16_t available = availIndex_ - lastAvail_;
  if (available > size) {
    reason = "available index " + std::to_string(availIndex_) + " is " + std::to_string(available) + " ahead of " +
             std::to_string(lastAvail_) + ", the ring has " + std::to_string(size);
    return false;
  }
  // A driver that does not wait for what it gets back would have it pile up here.
  const uint32_t owned = uint32_t{available} + static_cast<uint16_t>(lastAvail_ - published_);
  if (owned > size) {
    reason = "available index " + std::to_string(availIndex_) + " is " + std::to_string(owned) + " ahead of used index " +
             std::to_string(published_) + ", the ring has " + std::to_string(size);
    return false;
  }
  aheadCount_ = count;
  for (uint16_t index = 0; index < std::min(count, kBuffersAhead); index++) prefetch(dma, ahead_[index]);
  return true;
}

/** Of a chain's first buffer, or its indirect table. */
void SplitQueue::prefetch(const DmaTable& dma, const Ahead& chain) const {
  if (chain.head >= config_.size) return;
  const Descriptor& first = chain.first;
  const bool written = (first.flags & (kWrite | kIndirect)) == kWrite;
  const uint32_t bytes = std::min({first.length, kMostPrefetched, written ? lastWritten_ : UINT32_MAX});
  const uint8_t* at = dma.contiguous(first.address, bytes, written);
  if (at == nullptr) return;
  if (written) {
    prefetchForWriting(at, bytes);
  } else {
    prefetchForReading(at, bytes);
  }
}

bool SplitQueue::checkHead(uint16_t head, std::string& reason) const {
  if (head >= config_.size) {
    reason = "available head " + std::to_string(head) + " is outside the ring of " + std::to_string(config_.size);
    return false;
  }
  if (taken_[head] != 0) {
    reason = "available head " + std::to_string(head) + " has not been given back yet";
    return false;
  }
  return true;
}

bool SplitQueue::isLast(const Descriptor& descriptor) {
  return (descriptor.flags & kIndirect) != 0 || (descriptor.flags & kNext) == 0;
}

bool SplitQueue::readDirect(uint16_t head, std::string& reason) {
  enum { done, outOfRange, loop } end = done;
  const uint16_t size = config_.size;
  size_t count = 0;
  uint16_t at = head;
  const bool readable = guarded([&] {
    for (;;) {
      if (at >= size) {
        end = outOfRange;
        return;
      }
      if (count == size) {
        end = loop;
        return;
      }
      Descriptor& copy = direct_[count++];
      memcpy(&copy, const_cast<const Descriptor*>(desc_ + at), sizeof copy);
      if (isLast(copy)) return;
      at = copy.next;
    }
  });
  if (readable && end == done) {
    directCount_ = count;
    return true;
  }
  if (!readable) {
    reason = "memory of the descriptor table is gone";
  } else if (end == outOfRange) {
    reason = nameOf(head) + " links to descriptor " + std::to_string(at) + " of " + std::to_string(size);
  } else {
    reason = nameOf(head) + " loops";
  }
  return false;
}

bool SplitQueue::readIndirect(const DmaTable& dma, const Descriptor& table, Chain& chain, std::string& reason) {
  reason = refusal(table, chain.head);
  if (!reason.empty()) return false;
  scratch_.clear();
  if (!dma.translate(table.address, table.length, false, scratch_)) {
    reason = "indirect table of " + nameOf(chain.head) + " at " + hex(table.address) + " is not mapped";
    return false;
  }
  uint8_t* to = reinterpret_cast<uint8_t*>(indirectTable_.data());
  const bool readable = guarded([&] {
    for (const iovec& part : scratch_) {
      memcpy(to, part.iov_base, part.iov_len);
      to += part.iov_len;
    }
  });
  if (!readable) reason = "memory of the indirect table of " + nameOf(chain.head) + " is gone";
  return readable;
}

/** Empty, or why a chain has no such indirect table. */
std::string SplitQueue::refusal(const Descriptor& table, uint16_t head) const {
  if (!indirect_) return nameOf(head) + " is indirect, which was not negotiated";
  if (table.flags & kNext) return nameOf(head) + " continues behind its indirect table";
  if (table.length != 0 && table.length % sizeof(Descriptor) == 0 &&
      table.length / sizeof(Descriptor) <= indirectTable_.size()) {
    return {};
  }
  return "indirect table of " + nameOf(head) + " has " + std::to_string(table.length) + " bytes; a multiple of 16 up to " +
         std::to_string(16 * indirectTable_.size());
}

void SplitQueue::push(uint16_t head, uint32_t written) {
  forget(head);
  lastUsed_++;
  lastWritten_ = written;
  pushed_.push_back({head, written});
}

void SplitQueue::forget(uint16_t head) {
  taken_[head] = 0;
}

std::vector<uint16_t> SplitQueue::inFlight() const {
  std::vector<uint16_t> heads;
  for (uint32_t head = 0; head < config_.size; head++) {
    if (taken_[head] != 0) heads.push_back(static_cast<uint16_t>(head));
  }
  std::sort(heads.begin(), heads.end(), [this](uint16_t one, uint16_t other) { return taken_[one] < taken_[other]; });
  return heads;
}

/** Of the used ring. */
void SplitQueue::note(uint64_t offset, uint64_t length) {
  if (log_ != nullptr) log_->wrote(config_.device + offset, length);
}

/** Those that are not in the ring yet. */
void SplitQueue::storeElements() {
  for (size_t index = stored_; index < pushed_.size(); index++) {
    UsedElement* element = usedRing_ + (published_ + index) % config_.size;
    __atomic_store_n(&element->id, pushed_[index].id, __ATOMIC_RELAXED);
    __atomic_store_n(&element->length, pushed_[index].length, __ATOMIC_RELAXED);
  }
}

/** Of those that are not in the ring yet. */
void SplitQueue::noteElements() {
  if (log_ == nullptr || stored_ == pushed_.size()) return;
  const size_t first = (published_ + stored_) % config_.size;
  const size_t count = pushed_.size() - stored_;
  const size_t behind = std::min<size_t>(count, config_.size - first);
  note(kUsedHead + sizeof(UsedElement) * first, sizeof(UsedElement) * behind);
  if (count > behind) note(kUsedHead, sizeof(UsedElement) * (count - behind));
}

bool SplitQueue::store() {
  if (stored_ == pushed_.size()) return true;
  noteElements();
  const bool reachable = guarded([this] { storeElements(); });
  stored_ = pushed_.size();
  return reachable;
}

bool SplitQueue::publish(bool& call) {
  call = false;
  if (published_ == lastUsed_) return true;
  const uint16_t before = published_;
  const uint16_t size = config_.size;
  noteElements();
  note(kUsedIndex, sizeof *usedHead_);
  const bool reachable = guarded([&] {
    storeElements();
    __atomic_store_n(usedHead_ + 1, lastUsed_, __ATOMIC_RELEASE);
    // The driver writes its event and then looks at the index: the index must be out before the event is read.
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    call = eventIdx_ ? passed(__atomic_load_n(avail_ + 2 + size, __ATOMIC_RELAXED), lastUsed_, before)
                     : (__atomic_load_n(avail_, __ATOMIC_RELAXED) & kNoInterrupt) == 0;
  });
  published_ = lastUsed_;
  pushed_.clear();
  stored_ = 0;
  return reachable;
}

bool SplitQueue::disarm() {
  // With EVENT_IDX an event that stays behind has the same effect.
  if (disarmed_ || eventIdx_) return true;
  disarmed_ = true;
  note(0, sizeof *usedHead_);
  return guarded([&] { __atomic_store_n(usedHead_, kNoNotify, __ATOMIC_RELAXED); });
}

bool SplitQueue::arm(bool& more) {
  disarmed_ = false;
  note(eventIdx_ ? usedBytes(config_.size) - sizeof *availEvent_ : 0, sizeof *usedHead_);
  return guarded([&] {
    if (eventIdx_) {
      __atomic_store_n(availEvent_, availIndex_, __ATOMIC_RELAXED);
    } else {
      __atomic_store_n(usedHead_, uint16_t{0}, __ATOMIC_RELAXED);
    }
    // The driver publishes its index and then reads this: a chain added before it could see it must be seen here.
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    more = __atomic_load_n(avail_ + 1, __ATOMIC_ACQUIRE) != availIndex_;
  });
}

}  // namespace vhostd::ring
