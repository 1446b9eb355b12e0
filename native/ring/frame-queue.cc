#include "frame-queue.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "../guard.h"

namespace vhostd::ring {

FrameQueue::FrameQueue() {
  void* memory = mmap(nullptr, kCapacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory != MAP_FAILED) memory_.reset(static_cast<uint8_t*>(memory));
}

void FrameQueue::Free::operator()(uint8_t* memory) const { munmap(memory, kCapacity); }

uint64_t FrameQueue::room(size_t total) {
  const uint64_t bytes = offsetof(Record, header) + total;
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

NetFrame FrameQueue::frameAt(uint64_t position) const {
  Record* record = recordAt(position);
  return {&record->header, reinterpret_cast<uint8_t*>(record + 1), record->total - sizeof(NetHeader)};
}

uint64_t FrameQueue::knownTaken() const {
  return std::max(taken_.load(std::memory_order_acquire), begin_.load(std::memory_order_relaxed));
}

/** The first of a batch, and nothing is left of those before. */
bool FrameQueue::isEmpty() const {
  return shown_.load(std::memory_order_relaxed) == tail_ && knownTaken() == tail_;
}

bool FrameQueue::findRoom(uint64_t end) {
  if (end - knownHead_ <= kCapacity) return true;
  knownHead_ = knownTaken();
  return end - knownHead_ <= kCapacity;
}

Sent FrameQueue::put(const std::vector<iovec>& parts, size_t total, uint64_t features) {
  if (!memory_) return Sent::dropped;
  const uint64_t needed = room(total);
  const uint64_t toEnd = kCapacity - (tail_ & (kCapacity - 1));
  // What was just in use is in the cache, the rest may not be.
  const bool anew = isEmpty();
  // In one piece: the end is left out where it does not fit there.
  const bool skips = anew || toEnd < needed;
  const uint64_t at = skips ? tail_ + toEnd : tail_;
  if (!anew && !findRoom(at + needed)) return Sent::dropped;
  Record* record = recordAt(at);
  uint8_t* to = reinterpret_cast<uint8_t*>(&record->header);
  const bool reachable = guarded([&] {
    for (const iovec& part : parts) {
      memcpy(to, part.iov_base, part.iov_len);
      to += part.iov_len;
    }
  });
  if (!reachable || !maySend(record->header, total - sizeof(NetHeader), features)) return Sent::bad;
  record->total = static_cast<uint32_t>(total);
  if (anew) {
    begin_.store(at, std::memory_order_relaxed);
    knownHead_ = at;
  } else if (skips) {
    recordAt(tail_)->total = kWrap;
  }
  putAt_ = at;
  tail_ = at + needed;
  return Sent::sent;
}

bool FrameQueue::show() {
  if (shown_.load(std::memory_order_relaxed) == tail_) return false;
  // Either this sees that the taker waits, or the taker sees what is shown here.
  shown_.store(tail_, std::memory_order_seq_cst);
  return awaited_.load(std::memory_order_seq_cst) && awaited_.exchange(false);
}

bool FrameQueue::peek(NetFrame& frame, bool wake) {
  if (head_ == knownTail_) knownTail_ = shown_.load(std::memory_order_acquire);
  if (head_ == knownTail_) {
    if (!wake) return false;
    // All is taken: the putter may have the room, whatever the batch.
    awaited_.store(true, std::memory_order_seq_cst);
    knownTail_ = shown_.load(std::memory_order_seq_cst);
    if (head_ == knownTail_) return false;
  }
  head_ = std::max(head_, begin_.load(std::memory_order_relaxed));
  if (recordAt(head_)->total == kWrap) head_ += kCapacity - (head_ & (kCapacity - 1));
  frame = frameAt(head_);
  return true;
}

void FrameQueue::take() {
  head_ += room(recordAt(head_)->total);
  taken_.store(head_, std::memory_order_release);
}

void FrameQueue::discard() {
  head_ = knownTail_ = shown_.load(std::memory_order_acquire);
  taken_.store(head_, std::memory_order_release);
}

}  // namespace vhostd::ring
