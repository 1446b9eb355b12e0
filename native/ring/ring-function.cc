#include "ring-function.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <ctime>

namespace vhostd::ring {
namespace {

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

/** 0 or -errno. */
int addToEpoll(int epoll, int fd, uint32_t name) {
  epoll_event event = {};
  event.events = EPOLLIN | EPOLLET;
  event.data.u32 = name;
  return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == 0 ? 0 : -errno;
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
  if (!reason.empty()) {
    reason = "the ring worker " + backend + " needs the parameter " + reason;
    return nullptr;
  }
  reason = function->backend_->open([&events = function->events_] { signalOwn(events); });
  return reason.empty() ? std::move(function) : nullptr;
}

bool RingFunction::open(std::string& reason) {
  prepareInterrupt();
  events_ = File(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  wake_ = File(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  epoll_ = File(epoll_create1(EPOLL_CLOEXEC));
  bool good = events_.valid() && wake_.valid() && epoll_.valid() && addToEpoll(epoll_.number(), wake_.number(), kWakeEvent) == 0;
  for (uint32_t index = 0; good && index < slots_.size(); index++) {
    slots_[index]->doorbell = File(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
    good = slots_[index]->doorbell.valid() && addToEpoll(epoll_.number(), slots_[index]->doorbell.number(), index) == 0;
  }
  if (!good) reason = std::string("no eventfd for a queue: ") + strerror(errno);
  return good;
}

/** Ours and non-blocking: where it is full it is signalled already. */
void RingFunction::signalOwn(const File& file) {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t done = write(file.number(), &one, sizeof one);
}

RingFunction::~RingFunction() {
  withdraw();
  requestStop(Stop::drop);
  while (backend_ && !tryStop(10)) {
  }
  for (const DmaMapping& mapping : dma_.removeAll()) {
    cutLogs(mapping);
    unmapFile(mapping);
  }
  // Before the eventfd that it notifies control with.
  backend_.reset();
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
  cutLogs(mapping);
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
    backend_->released();
  }
  for (const DmaMapping& mapping : mappings) cutLogs(mapping);
  unmapFiles(std::move(mappings), unmapsUnderWay_);
}

std::string RingFunction::activate(uint16_t queue, const QueueConfig& config, uint64_t features) {
  constexpr int kIndirectDesc = 28;
  constexpr int kEventIdx = 29;
  ControlTurn turn(gate_);
  Slot& slot = *slots_[queue];
  if (slot.queue.active()) return "queue " + std::to_string(queue) + " is active";
  std::string reason = SplitQueue::check(config, dma_);
  if (!reason.empty()) return reason;
  slot.queue.activate(config, dma_, (features >> kIndirectDesc & 1) != 0, (features >> kEventIdx & 1) != 0);
  inFlight_ = inFlight_ + static_cast<uint32_t>(config.inFlight.size());
  slot.ready = true;
  backend_->ringsChanged();
  signalOwn(wake_);
  return {};
}

std::string RingFunction::start(uint64_t features) {
  if (threadStarted_) return "the worker runs already";
  if (failed_) return failure();
  ended_ = false;
  stop_ = Stop::no;
  backend_->start(features);
  const std::string reason = watchSources();
  if (!reason.empty()) return reason;
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
  File call;
  if (fd >= 0) {
    call = File::duplicate(fd);
    if (!call.valid()) return false;
  }
  takeCall(queue, std::move(call));
  return true;
}

void RingFunction::takeCall(uint16_t queue, File call) {
  std::shared_ptr<File> next;
  if (call.valid()) next = std::make_shared<File>(std::move(call));
  std::lock_guard lock(callMutex_);
  slots_[queue]->call.swap(next);
}

int RingFunction::setKick(uint16_t queue, int fd) {
  Slot& slot = *slots_[queue];
  File kick;
  if (fd >= 0) {
    kick = File::duplicate(fd);
    if (!kick.valid()) return -errno;
    const int error = addToEpoll(epoll_.number(), kick.number(), queue);
    if (error != 0) return error;
  }
  // Not by closing it alone: someone else has the same file open.
  if (slot.kick.valid()) epoll_ctl(epoll_.number(), EPOLL_CTL_DEL, slot.kick.number(), nullptr);
  slot.kick = std::move(kick);
  // A signal of the former may not have been collected.
  slot.ready = true;
  signalOwn(wake_);
  return 0;
}

void RingFunction::quiesce() {
  ControlTurn turn(gate_);
  quiesced_ = true;
}

bool RingFunction::passCalls() {
  if (!calling_) return true;
  // One that comes just before the system call interrupts nothing.
  if (threadStarted_) pthread_kill(thread_, interruptSignal());
  return false;
}

void RingFunction::unquiesce() {
  quiesced_ = false;
  lookAround();
}

/** The worker looks at all rings once more, notified or not. */
void RingFunction::lookAround() {
  for (const auto& slot : slots_) slot->ready = true;
  signalOwn(wake_);
}

/**
 * Has the epoll wait for the backend's files, edge-triggered. One that was closed has left the epoll by itself, and
 * another may have its number.
 */
std::string RingFunction::watchSources() {
  const std::vector<int> wanted = backend_->sources();
  for (const int fd : sources_) {
    if (std::find(wanted.begin(), wanted.end(), fd) == wanted.end()) {
      epoll_ctl(epoll_.number(), EPOLL_CTL_DEL, fd, nullptr);
    }
  }
  sources_ = wanted;
  for (uint32_t index = 0; index < wanted.size(); index++) {
    if (wanted[index] < 0) continue;
    const int error = addToEpoll(epoll_.number(), wanted[index], kFirstSource + index);
    if (error != 0 && error != -EEXIST) return std::string("its files cannot be waited for: ") + strerror(-error);
  }
  return {};
}

std::vector<QueueState> RingFunction::rings() {
  ControlTurn turn(gate_);
  std::vector<QueueState> states;
  for (uint16_t index = 0; index < slots_.size(); index++) {
    const SplitQueue& queue = slots_[index]->queue;
    if (queue.active()) states.push_back({index, queue.lastAvail(), queue.lastUsed(), queue.inFlight()});
  }
  return states;
}

void RingFunction::answer(uint64_t id, std::vector<uint8_t> bytes) {
  if (backend_->answer(id, std::move(bytes))) signalOwn(wake_);
}

std::string RingFunction::configure(const Parameters& parameters) {
  ControlTurn turn(gate_);
  std::string reason;
  for (const auto& [name, value] : parameters) {
    reason = backend_->set(name, value);
    if (reason.empty()) continue;
    reason = "parameter " + name + ": " + reason;
    break;
  }
  const std::string unwatched = watchSources();
  if (reason.empty()) reason = unwatched;
  // What is kept may be due earlier now.
  signalOwn(wake_);
  return reason;
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
  inFlight_ = 0;
  endedInTurn_ = 0;
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
  const auto value = [](const std::atomic<uint64_t>& counter) { return counter.load(std::memory_order_relaxed); };
  return {value(slot.received), value(slot.completed), value(slot.bad), value(slot.bytes)};
}

}  // namespace vhostd::ring
