#include <sched.h>
#include <sys/epoll.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "../guard.h"
#include "../symbols.h"
#include "ring-function.h"

/** The worker's side of a function: all of it runs on its thread but `fail`. */
namespace vhostd::ring {
namespace {

/** Of one queue in one turn. */
constexpr int kBatch = 64;
constexpr uint64_t kBatchBytes = 1 << 18;
constexpr size_t kMostVectors = 1024;
/** Of a worker that polls, in a row: to ask the system costs as much as some frames. */
constexpr unsigned kUnnotifiedTurns = 16;
/** Taken from the system at a time. */
constexpr int kNotifications = 64;

/** Of a counter with one writer: cheaper than an increment that others could make, too. */
void add(std::atomic<uint64_t>& counter, uint64_t count) {
  counter.store(counter.load(std::memory_order_relaxed) + count, std::memory_order_relaxed);
}

}  // namespace

void RingFunction::run() {
  while (stop_ == Stop::no && !failed_) {
    gate_.enterWorker();
    const bool more = turn();
    gate_.leaveWorker();
    signalCalls();
    if (stop_ != Stop::no || failed_) break;
    betweenTurns(more);
  }
  if (stop_ == Stop::finish && !failed_) {
    gate_.enterWorker();
    for (uint16_t index = 0; index < slots_.size(); index++) {
      if (!backend_->pulls(index)) serveAgain(*slots_[index], index);
    }
    if (!failed_) backend_->drain(*this);
    publish();
    gate_.leaveWorker();
    signalCalls();
  }
  if (failed_) backend_->broken();
  ended_ = true;
}

/** `more`: the turn has left something. */
void RingFunction::betweenTurns(bool more) {
  const bool notified = !polling_;
  const unsigned patience = backend_->patience();
  idleTurns_ = turnChains_ > 0 ? 0 : idleTurns_ + 1;
  polling_ = idleTurns_ < patience;
  if (!more && notified) return collectNotifications(untilDue());
  if (polling_ && idleTurns_ > 0) sched_yield();
  // A queue that is never empty keeps no other from being seen.
  if (!severalActive_ || ++unnotifiedTurns_ < (patience > 0 ? kUnnotifiedTurns : 1)) return;
  unnotifiedTurns_ = 0;
  collectNotifications(0);
}

/** One round over the queues that have something to do. True where there is more. */
bool RingFunction::turn() {
  bool more = false;
  int active = 0;
  turnBytes_ = 0;
  turnChains_ = 0;
  for (uint16_t index = 0; index < slots_.size() && !failed_; index++) {
    Slot& slot = *slots_[index];
    if (!slot.queue.active()) continue;
    active++;
    if (slot.ready && !backend_->pulls(index)) more |= serveQueue(slot, index);
  }
  severalActive_ = active > 1;
  const int64_t due = failed_ ? -1 : backend_->due();
  if (due >= 0) {
    const int64_t now = monotonicNow();
    if (due <= now) backend_->resume(now, *this);
  }
  if (!failed_) more |= backend_->poll(*this);
  publish();
  due_ = backend_->due();
  return more;
}

/** A bounded batch of one queue. True where it is not empty afterwards. */
bool RingFunction::serveQueue(Slot& slot, uint16_t index) {
  if (!quiesced_ && !slot.queue.disarm()) {
    fail("memory of the used ring of queue " + std::to_string(index) + " is gone");
    return false;
  }
  const uint64_t before = turnBytes_;
  for (int count = 0; count < kBatch && turnBytes_ - before < kBatchBytes; count++) {
    if (failed_ || stop_ != Stop::no || gate_.wanted()) return true;
    Chain* chain = takeChain();
    std::string reason;
    const Pop pop = popNext(slot, *chain, reason);
    if (pop == Pop::chain) {
      chain->queue = index;
      backend_->serve(chain, *this);
      continue;
    }
    releaseChain(chain);
    if (pop == Pop::broken) {
      fail("queue " + std::to_string(index) + ": " + reason);
      return false;
    }
    // Still to be looked at: `ready` stays.
    if (quiesced_ || polling_) return false;
    return arm(slot, index);
  }
  return true;
}

/** An empty queue is left alone until it is notified. True where it is not empty any more. */
bool RingFunction::arm(Slot& slot, uint16_t index) {
  // First: what control says from here on stays. And reading it shows what was there before control said so.
  slot.ready.exchange(false);
  bool more = false;
  if (!slot.queue.arm(more)) {
    fail("memory of the used ring of queue " + std::to_string(index) + " is gone");
    return false;
  }
  if (more) slot.ready = true;
  return more;
}

bool RingFunction::stocked(uint16_t queue) const {
  const Slot& slot = *slots_[queue];
  return slot.queue.active() && !failed_ && (quiesced_ ? slot.queue.owesAgain() : slot.ready.load());
}

Chain* RingFunction::pull(uint16_t queue) {
  Slot& slot = *slots_[queue];
  if (!slot.queue.active() || failed_) return nullptr;
  Chain* chain = takeChain();
  std::string reason;
  do {
    if (!quiesced_ && !slot.queue.disarm()) {
      reason = "memory of the used ring is gone";
      break;
    }
    const Pop pop = popNext(slot, *chain, reason);
    if (pop == Pop::chain) {
      chain->queue = queue;
      return chain;
    }
    if (pop == Pop::broken) break;
    // A look at the ring costs less than a notification.
  } while (!quiesced_ && !polling_ && arm(slot, queue));
  releaseChain(chain);
  if (!reason.empty()) fail("queue " + std::to_string(queue) + ": " + reason);
  return nullptr;
}

void RingFunction::putBack(Chain* chain) {
  Slot& slot = *slots_[chain->queue];
  slot.queue.putBack(*chain);
  slot.received.store(slot.received.load(std::memory_order_relaxed) - 1, std::memory_order_relaxed);
  if (!chain->again) inFlight_.store(inFlight_.load(std::memory_order_relaxed) - 1, std::memory_order_relaxed);
  releaseChain(chain);
}

/** What was in flight when the ring was activated and has not been read since. */
void RingFunction::serveAgain(Slot& slot, uint16_t index) {
  std::string reason;
  while (slot.queue.active() && !failed_ && giveWay()) {
    Chain* chain = takeChain();
    const Pop pop = slot.queue.popAgain(dma_, *chain, reason);
    if (pop == Pop::chain) {
      add(slot.received, 1);
      chain->queue = index;
      backend_->serve(chain, *this);
      continue;
    }
    releaseChain(chain);
    if (pop == Pop::broken) fail("queue " + std::to_string(index) + ": " + reason);
    return;
  }
}

/** What the device has taken goes on while it is quiesced. */
Pop RingFunction::popNext(Slot& slot, Chain& chain, std::string& reason) {
  Pop pop = slot.queue.popAgain(dma_, chain, reason);
  if (pop == Pop::empty && !quiesced_) {
    pop = slot.queue.pop(dma_, chain, reason);
    if (pop == Pop::chain) inFlight_.store(inFlight_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  }
  if (pop == Pop::chain) add(slot.received, 1);
  return pop;
}

void RingFunction::publish() {
  if (log_) markAhead();
  for (uint16_t index = 0; index < slots_.size() && !failed_; index++) {
    Slot& slot = *slots_[index];
    if (!slot.queue.active()) continue;
    bool call = false;
    if (!slot.queue.publish(call)) fail("memory of the rings of queue " + std::to_string(index) + " is gone");
    if (!call) continue;
    std::lock_guard lock(callMutex_);
    slot.signalTo = slot.call;
  }
  if (log_) flushLog();
  if (endedInTurn_ == 0) return;
  inFlight_.store(inFlight_.load(std::memory_order_relaxed) - endedInTurn_, std::memory_order_release);
  endedInTurn_ = 0;
}

/** Outside the turn: a peer's eventfd may block. */
void RingFunction::signalCalls() {
  for (const auto& slot : slots_) {
    if (!slot->signalTo) continue;
    const std::shared_ptr<File> call = std::move(slot->signalTo);
    signalCall(call->number());
  }
}

/**
 * A write is three times as fast as what cannot block. Where it blocks and is interrupted nothing is lost: the counter
 * is full, its reader has yet to see that.
 */
void RingFunction::signalCall(int call) {
  calling_ = true;
  if (!quiesced_ && stop_ == Stop::no) {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t done = write(call, &one, sizeof one);
    calling_ = false;
    return;
  }
  calling_ = false;
  // Control waits for what was taken to be given back.
  vhostd_signal_eventfd(call);
}

/** Milliseconds; -1 for ever. */
int RingFunction::untilDue() const {
  if (due_ < 0) return -1;
  return static_cast<int>(std::max<int64_t>(0, (due_ - monotonicNow() + 999'999) / 1'000'000));
}

/** Where there are more than fit, the system gives the others first when it is asked again, after the next turn. */
void RingFunction::collectNotifications(int timeout) {
  epoll_event events[kNotifications];
  const int count = epoll_wait(epoll_.number(), events, kNotifications, timeout);
  for (int index = 0; index < count; index++) {
    const uint32_t name = events[index].data.u32;
    if (name < kFirstSource) {
      slots_[name]->ready = true;
    } else if (name != kWakeEvent) {
      backend_->signalled(name - kFirstSource, events[index].events);
    }
  }
}

Chain* RingFunction::takeChain() {
  if (freeChains_.empty()) {
    chains_.push_back(std::make_unique<Chain>());
    freeChains_.reserve(chains_.size());
    return chains_.back().get();
  }
  Chain* chain = freeChains_.back();
  freeChains_.pop_back();
  return chain;
}

void RingFunction::releaseChain(Chain* chain) {
  freeChains_.push_back(chain);
}

/** Where that part of a chain of one buffer is, as most have; else nullptr. */
uint8_t* RingFunction::inOnePiece(const Chain& chain, Direction direction, uint64_t skip, uint64_t length) const {
  const bool writable = direction == Direction::writable;
  const std::vector<Segment>& segments = writable ? chain.writable : chain.readable;
  if (length == 0 || segments.size() != 1 || skip + length > segments[0].length) return nullptr;
  return dma_.contiguous(segments[0].iova + skip, length, writable);
}

const std::vector<iovec>* RingFunction::vectors(const Chain& chain, Direction direction, uint64_t skip,
                                                uint64_t length) {
  const bool writable = direction == Direction::writable;
  vectors_.clear();
  if (uint8_t* host = inOnePiece(chain, direction, skip, length)) {
    vectors_.push_back({host, length});
    if (writable) note(chain.writable[0].iova + skip, length);
    return &vectors_;
  }
  for (const Segment& segment : writable ? chain.writable : chain.readable) {
    if (skip >= segment.length) {
      skip -= segment.length;
      continue;
    }
    const uint64_t part = std::min(segment.length - skip, length);
    if (!dma_.translate(segment.iova + skip, part, writable, vectors_)) return nullptr;
    if (writable) note(segment.iova + skip, part);
    skip = 0;
    length -= part;
    if (length == 0 || vectors_.size() >= kMostVectors) break;
  }
  if (vectors_.size() > kMostVectors) vectors_.resize(kMostVectors);
  return &vectors_;
}

bool RingFunction::copyFrom(const Chain& chain, uint64_t skip, void* to, size_t length) {
  if (const uint8_t* from = inOnePiece(chain, Direction::readable, skip, length)) {
    return guarded([&] { memcpy(to, from, length); });
  }
  uint8_t* at = static_cast<uint8_t*>(to);
  return copyParts(chain, Direction::readable, skip, length, [&at](const iovec& part) {
    memcpy(at, part.iov_base, part.iov_len);
    at += part.iov_len;
  });
}

bool RingFunction::copyTo(const Chain& chain, uint64_t skip, const void* from, size_t length) {
  if (uint8_t* to = inOnePiece(chain, Direction::writable, skip, length)) {
    note(chain.writable[0].iova + skip, length);
    return guarded([&] { memcpy(to, from, length); });
  }
  const uint8_t* at = static_cast<const uint8_t*>(from);
  return copyParts(chain, Direction::writable, skip, length, [&at](const iovec& part) {
    memcpy(part.iov_base, at, part.iov_len);
    at += part.iov_len;
  });
}

/** Exactly `length` bytes, however many parts they are in. */
template <typename Copy>
bool RingFunction::copyParts(const Chain& chain, Direction direction, uint64_t skip, size_t length, Copy copy) {
  while (length > 0) {
    if (vectors(chain, direction, skip, length) == nullptr || vectors_.empty()) return false;
    size_t copied = 0;
    for (const iovec& part : vectors_) copied += part.iov_len;
    const bool reachable = guarded([&] {
      for (const iovec& part : vectors_) copy(part);
    });
    if (!reachable) return false;
    skip += copied;
    length -= copied;
  }
  return true;
}

void RingFunction::complete(Chain* chain, uint32_t written, uint64_t bytes, bool error) {
  Slot& slot = *slots_[chain->queue];
  const uint16_t head = chain->head;
  turnBytes_ += bytes;
  turnChains_++;
  add(slot.completed, 1);
  add(slot.bytes, bytes);
  if (error) add(slot.bad, 1);
  releaseChain(chain);
  endedInTurn_++;
  slot.queue.push(head, written);
}

void RingFunction::abandon(Chain* chain) {
  slots_[chain->queue]->queue.forget(chain->head);
  releaseChain(chain);
  endedInTurn_++;
}

void RingFunction::callControl() {
  signalOwn(events_);
}

/** Inside a turn, the worker's or control's. The first reason is kept. */
void RingFunction::fail(std::string reason) {
  {
    std::lock_guard lock(failureMutex_);
    if (failed_) return;
    failure_ = std::move(reason);
    failed_ = true;
  }
  signalOwn(wake_);
  signalOwn(events_);
}

bool RingFunction::giveWay() {
  if (stop_ == Stop::drop || failed_) return false;
  if (!gate_.wanted()) return true;
  gate_.leaveWorker();
  gate_.enterWorker();
  return stop_ != Stop::drop && !failed_;
}

void RingFunction::blocking(const std::function<void()>& work) {
  publish();
  gate_.leaveWorker();
  signalCalls();
  work();
  gate_.enterWorker();
}

}  // namespace vhostd::ring
