#include "ring-function.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <ctime>

#include "../guard.h"

namespace vhostd::ring {
namespace {

/** Of one queue in one turn. */
constexpr int kBatch = 64;
constexpr uint64_t kBatchBytes = 1 << 18;
constexpr size_t kMostVectors = 1024;
/** Taken from the system at a time. */
constexpr int kNotifications = 64;
constexpr uint32_t kWakeEvent = UINT32_MAX;

/** Interrupts a worker that hangs in a write to a peer's full eventfd. Does nothing else. */
int interruptSignal() { return SIGRTMIN + 7; }

void prepareInterrupt() {
  static std::once_flag installed;
  std::call_once(installed, [] {
    struct sigaction action = {};
    action.sa_handler = [](int) {};
    sigaction(interruptSignal(), &action, nullptr);
  });
}

bool addToEpoll(int epoll, int fd, uint32_t name) {
  epoll_event event = {};
  event.events = EPOLLIN | EPOLLET;
  event.data.u32 = name;
  return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == 0;
}

void signalOwn(const File& file) {
  const uint64_t one = 1;
  // Our own and non-blocking: where it is full it is signalled already.
  [[maybe_unused]] const ssize_t done = write(file.number(), &one, sizeof one);
}

}  // namespace

std::unique_ptr<RingFunction> RingFunction::create(const std::string& backend, const Parameters& parameters,
                                                   uint16_t queues, std::string& reason) {
  std::unique_ptr<RingFunction> function(new RingFunction());
  function->backend_ = createBackend(backend);
  if (!function->backend_) {
    reason = "there is no ring worker named " + backend;
    return nullptr;
  }
  for (uint16_t index = 0; index < queues; index++) function->slots_.push_back(std::make_unique<Slot>());
  if (!function->open(reason)) return nullptr;
  reason = function->configure(parameters);
  if (!reason.empty()) return nullptr;
  reason = function->backend_->missing();
  if (reason.empty()) return function;
  reason = "the ring worker " + backend + " needs the parameter " + reason;
  return nullptr;
}

bool RingFunction::open(std::string& reason) {
  prepareInterrupt();
  events_ = File(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  wake_ = File(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  epoll_ = File(epoll_create1(EPOLL_CLOEXEC));
  bool good = events_.valid() && wake_.valid() && epoll_.valid() && addToEpoll(epoll_.number(), wake_.number(), kWakeEvent);
  for (uint32_t index = 0; good && index < slots_.size(); index++) {
    slots_[index]->doorbell = File(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
    good = slots_[index]->doorbell.valid() && addToEpoll(epoll_.number(), slots_[index]->doorbell.number(), index);
  }
  if (!good) reason = std::string("no eventfd for a queue: ") + strerror(errno);
  return good;
}

RingFunction::~RingFunction() {
  withdraw();
  requestStop(Stop::drop);
  while (!tryStop(10)) {
  }
  for (const DmaMapping& mapping : dma_.removeAll()) unmapFile(mapping);
}

int RingFunction::map(uint64_t iova, uint64_t size, int fd, uint64_t offset, bool writable) {
  DmaMapping mapping;
  mapping.iova = iova;
  int error = mapFile(fd, offset, size, writable, mapping);
  if (error != 0) return error;
  {
    ControlTurn turn(gate_);
    error = dma_.insert(mapping);
  }
  if (error != 0) unmapFile(mapping);
  return error;
}

int RingFunction::unmap(uint64_t iova, uint64_t size) {
  DmaMapping mapping;
  {
    ControlTurn turn(gate_);
    const int error = dma_.remove(iova, size, mapping);
    if (error != 0) return error;
    for (size_t index = 0; index < slots_.size(); index++) {
      if (slots_[index]->queue.uses(iova, size)) {
        fail("ring of queue " + std::to_string(index) + " was unmapped while in use");
      }
    }
  }
  unmapFiles({mapping}, unmapsUnderWay_);
  return 0;
}

void RingFunction::unmapAll() {
  std::vector<DmaMapping> mappings;
  {
    ControlTurn turn(gate_);
    mappings = dma_.removeAll();
    if (std::any_of(slots_.begin(), slots_.end(), [](const auto& slot) { return slot->queue.active(); })) {
      fail("all memory was unmapped while rings were in use");
    }
  }
  unmapFiles(std::move(mappings), unmapsUnderWay_);
}

std::string RingFunction::activate(uint16_t queue, const QueueConfig& config, uint64_t features) {
  constexpr int kIndirectDesc = 28;
  constexpr int kEventIdx = 29;
  ControlTurn turn(gate_);
  std::string reason = SplitQueue::check(config, dma_);
  if (!reason.empty()) return reason;
  Slot& slot = *slots_[queue];
  slot.queue.activate(config, dma_, (features >> kIndirectDesc & 1) != 0, (features >> kEventIdx & 1) != 0);
  slot.ready = true;
  signalOwn(wake_);
  return {};
}

std::string RingFunction::start(uint64_t features) {
  if (threadStarted_) return "the worker runs already";
  if (failed_) return failure();
  ended_ = false;
  stop_ = Stop::no;
  backend_->start(features);
  // The thread takes no signal of the process but the one that is for it.
  sigset_t blocked, before;
  sigfillset(&blocked);
  for (const int number : {interruptSignal(), SIGBUS, SIGSEGV, SIGFPE, SIGILL}) sigdelset(&blocked, number);
  pthread_sigmask(SIG_SETMASK, &blocked, &before);
  const int error = pthread_create(
      &thread_, nullptr,
      [](void* self) -> void* {
        static_cast<RingFunction*>(self)->run();
        return nullptr;
      },
      this);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (error != 0) return std::string("no thread: ") + strerror(error);
  pthread_setname_np(thread_, "ring-worker");
  threadStarted_ = true;
  return {};
}

bool RingFunction::setCall(uint16_t queue, int fd) {
  std::shared_ptr<File> call;
  if (fd >= 0) {
    call = std::make_shared<File>(File::duplicate(fd));
    if (!call->valid()) return false;
  }
  std::lock_guard lock(callMutex_);
  slots_[queue]->call.swap(call);
  return true;
}

std::string RingFunction::configure(const Parameters& parameters) {
  ControlTurn turn(gate_);
  for (const auto& [name, value] : parameters) {
    const std::string reason = backend_->set(name, value);
    if (!reason.empty()) return "parameter " + name + ": " + reason;
  }
  // What is kept may be due earlier now.
  signalOwn(wake_);
  return {};
}

void RingFunction::requestStop(Stop how) {
  if (!threadStarted_) return;
  stop_ = how;
  signalOwn(wake_);
}

bool RingFunction::tryPark(int milliseconds) {
  if (!threadStarted_) return true;
  for (int64_t end = monotonicNow() + milliseconds * 1'000'000LL; !ended_;) {
    // Again and again: a signal that comes just before the system call interrupts nothing.
    pthread_kill(thread_, interruptSignal());
    if (monotonicNow() >= end) return false;
    const timespec pause = {0, 50'000};
    nanosleep(&pause, nullptr);
  }
  pthread_join(thread_, nullptr);
  threadStarted_ = false;
  return true;
}

bool RingFunction::tryStop(int milliseconds) {
  if (!tryPark(milliseconds)) return false;
  indices_.clear();
  for (uint16_t index = 0; index < slots_.size(); index++) {
    Slot& slot = *slots_[index];
    if (slot.queue.active()) indices_.push_back({index, slot.queue.lastAvail(), slot.queue.lastUsed()});
    slot.queue.deactivate();
    slot.ready = false;
    slot.signalTo.reset();
  }
  {
    std::lock_guard lock(failureMutex_);
    failure_.clear();
    failed_ = false;
  }
  backend_->drop();
  freeChains_.clear();
  for (const auto& chain : chains_) freeChains_.push_back(chain.get());
  return true;
}

std::string RingFunction::failure() const {
  std::lock_guard lock(failureMutex_);
  return failure_;
}

QueueStats RingFunction::stats(uint16_t queue) const {
  const Slot& slot = *slots_[queue];
  return {slot.requests.load(std::memory_order_relaxed), slot.bytes.load(std::memory_order_relaxed),
          slot.errors.load(std::memory_order_relaxed)};
}

void RingFunction::run() {
  while (stop_ == Stop::no && !failed_) {
    gate_.enterWorker();
    const bool more = turn();
    gate_.leaveWorker();
    signalCalls();
    if (stop_ != Stop::no || failed_) break;
    if (!more) {
      collectNotifications(untilDue());
    } else if (severalActive_) {
      // A queue that is never empty keeps no other from being seen.
      collectNotifications(0);
    }
  }
  if (stop_ == Stop::finish && !failed_) {
    gate_.enterWorker();
    backend_->drain(*this);
    publish();
    gate_.leaveWorker();
    signalCalls();
  }
  ended_ = true;
}

/** One round over the queues that have something to do. True where there is more. */
bool RingFunction::turn() {
  bool more = false;
  int active = 0;
  turnBytes_ = 0;
  for (uint16_t index = 0; index < slots_.size() && !failed_; index++) {
    Slot& slot = *slots_[index];
    if (!slot.queue.active()) continue;
    active++;
    if (slot.ready) more |= serveQueue(slot, index);
  }
  severalActive_ = active > 1;
  const int64_t due = failed_ ? -1 : backend_->due();
  if (due >= 0) {
    const int64_t now = monotonicNow();
    if (due <= now) backend_->resume(now, *this);
  }
  publish();
  due_ = backend_->due();
  return more;
}

/** A bounded batch of one queue. True where it is not empty afterwards. */
bool RingFunction::serveQueue(Slot& slot, uint16_t index) {
  if (!slot.queue.disarm()) {
    fail("memory of the used ring of queue " + std::to_string(index) + " is gone");
    return false;
  }
  const uint64_t before = turnBytes_;
  for (int count = 0; count < kBatch && turnBytes_ - before < kBatchBytes; count++) {
    if (failed_ || stop_ != Stop::no || gate_.wanted()) return true;
    Chain* chain = takeChain();
    std::string reason;
    const Pop pop = slot.queue.pop(dma_, *chain, reason);
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
    bool more = false;
    if (!slot.queue.arm(more)) {
      fail("memory of the used ring of queue " + std::to_string(index) + " is gone");
      return false;
    }
    slot.ready = more;
    return more;
  }
  return true;
}

void RingFunction::publish() {
  for (uint16_t index = 0; index < slots_.size() && !failed_; index++) {
    Slot& slot = *slots_[index];
    if (!slot.queue.active()) continue;
    bool call = false;
    if (!slot.queue.publish(call)) fail("memory of the rings of queue " + std::to_string(index) + " is gone");
    if (!call) continue;
    std::lock_guard lock(callMutex_);
    slot.signalTo = slot.call;
  }
}

/** Outside the turn: a peer's eventfd may block. */
void RingFunction::signalCalls() {
  for (const auto& slot : slots_) {
    if (!slot->signalTo) continue;
    const std::shared_ptr<File> call = std::move(slot->signalTo);
    const uint64_t one = 1;
    while (write(call->number(), &one, sizeof one) < 0 && errno == EINTR && stop_ == Stop::no) {
    }
  }
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
    if (events[index].data.u32 != kWakeEvent) slots_[events[index].data.u32]->ready = true;
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

const std::vector<iovec>* RingFunction::vectors(const Chain& chain, Direction direction, uint64_t skip,
                                                uint64_t length) {
  const bool writable = direction == Direction::writable;
  vectors_.clear();
  for (const Segment& segment : writable ? chain.writable : chain.readable) {
    if (skip >= segment.length) {
      skip -= segment.length;
      continue;
    }
    const uint64_t part = std::min(segment.length - skip, length);
    if (!dma_.translate(segment.iova + skip, part, writable, vectors_)) return nullptr;
    skip = 0;
    length -= part;
    if (length == 0 || vectors_.size() >= kMostVectors) break;
  }
  if (vectors_.size() > kMostVectors) vectors_.resize(kMostVectors);
  return &vectors_;
}

bool RingFunction::copyFrom(const Chain& chain, uint64_t skip, void* to, size_t length) {
  if (vectors(chain, Direction::readable, skip, length) == nullptr) return false;
  uint8_t* at = static_cast<uint8_t*>(to);
  return guarded([&] {
    for (const iovec& part : vectors_) {
      memcpy(at, part.iov_base, part.iov_len);
      at += part.iov_len;
    }
  });
}

bool RingFunction::copyTo(const Chain& chain, uint64_t skip, const void* from, size_t length) {
  if (vectors(chain, Direction::writable, skip, length) == nullptr) return false;
  const uint8_t* at = static_cast<const uint8_t*>(from);
  return guarded([&] {
    for (const iovec& part : vectors_) {
      memcpy(part.iov_base, at, part.iov_len);
      at += part.iov_len;
    }
  });
}

void RingFunction::complete(Chain* chain, uint32_t written, uint64_t bytes, bool error) {
  Slot& slot = *slots_[chain->queue];
  const uint16_t head = chain->head;
  turnBytes_ += bytes;
  slot.requests.fetch_add(1, std::memory_order_relaxed);
  slot.bytes.fetch_add(bytes, std::memory_order_relaxed);
  if (error) slot.errors.fetch_add(1, std::memory_order_relaxed);
  const uint16_t queue = chain->queue;
  releaseChain(chain);
  // The ring may have been unmapped while the request was served with the gate open.
  if (failed_) return;
  if (!slot.queue.push(head, written)) fail("memory of the used ring of queue " + std::to_string(queue) + " is gone");
}

void RingFunction::abandon(Chain* chain) {
  slots_[chain->queue]->queue.forget(chain->head);
  releaseChain(chain);
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
