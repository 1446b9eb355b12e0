#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>

#include "file.h"
#include "frame-queue.h"

namespace vhostd::ring {
namespace {

/** What comes to one end. The other end puts frames here, as long as it likes: it has a share of it. */
struct Inbox {
  explicit Inbox(unsigned pairs) : bell(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)), queues(pairs) {}

  /** Wakes who waits for frames. */
  const File bell;
  /** By pair. */
  std::vector<FrameQueue> queues;
};

/** One side of a wire, by the mutex. */
struct End {
  bool taken = false;
  /** Between start and stop. */
  bool started = false;
  /** Its worker has said what it receives with. */
  bool running = false;
  /**
   * What the other end sees. Rings that run switch it on. Those that stop switch it off, unless the link was down: whoever
   * is cut off by that comes back when the link is up. If it were off then, both ends could wait for each other for ever.
   */
  bool on = false;
  bool link = true;
  std::function<void()> notify;
  std::shared_ptr<Inbox> inbox;
  /** Pairs that frames may go to; ascending. */
  std::vector<unsigned> pairs;

  bool up() const { return on && link; }
};

struct Wire {
  End ends[2];
  /** Counts changes of either end. */
  std::atomic<uint64_t> changes{0};
};

/** For all wires of the process and what is known of their ends; never held while frames are moved. */
std::mutex& mutex() {
  static std::mutex one;
  return one;
}

std::map<std::string, std::weak_ptr<Wire>>& wires() {
  static std::map<std::string, std::weak_ptr<Wire>> all;
  return all;
}

/** One end of a wire. */
class WirePort final : public NetPort {
 public:
  WirePort(const NetPortOptions& options, std::shared_ptr<Wire> wire, unsigned side);
  ~WirePort() override;

  bool carrier() const override;
  void setLink(bool up) override;
  std::vector<int> sources() const override { return {inbox_->bell.number()}; }
  void start(uint64_t features) override;
  void stop() override;
  void hangUp() override;
  void release() override;
  void use(const std::vector<unsigned>& pairs) override;
  Sent send(unsigned pair, const std::vector<iovec>& parts, size_t total) override;
  void flush() override;
  bool peek(unsigned pair, NetFrame& frame, bool wake) override { return inbox_->queues[pair].peek(frame, wake); }
  void consume(unsigned pair) override { inbox_->queues[pair].take(); }

 private:
  template <typename Change>
  void change(Change change);
  void leave();
  void lookAtPeer();

  const std::string name_;
  const std::shared_ptr<Wire> wire_;
  const unsigned side_;
  const std::shared_ptr<Inbox> inbox_;
  uint64_t features_ = 0;
  /** In use; ascending. */
  std::vector<unsigned> used_;

  /** What the worker knows of the other end, since `seen_` changes: nowhere to send to while it is not up. */
  uint64_t seen_ = UINT64_MAX;
  std::shared_ptr<Inbox> peer_;
  std::vector<unsigned> targets_;
  /** By pair of the other end: frames were put that it has not been shown. */
  std::vector<bool> touched_;
  bool anyTouched_ = false;
};

WirePort::WirePort(const NetPortOptions& options, std::shared_ptr<Wire> wire, unsigned side)
    : name_(options.name), wire_(std::move(wire)), side_(side), inbox_(std::make_shared<Inbox>(options.pairs)) {
  End& own = wire_->ends[side_];
  own.taken = true;
  own.notify = options.notify;
  own.inbox = inbox_;
}

WirePort::~WirePort() {
  change([this](End& own) {
    own = {};
    if (!wire_->ends[side_ ^ 1].taken) wires().erase(name_);
  });
}

/** Something of this end, which the other learns of. */
template <typename Change>
void WirePort::change(Change change) {
  std::lock_guard lock(mutex());
  End& own = wire_->ends[side_];
  const End& other = wire_->ends[side_ ^ 1];
  const bool before = own.up();
  change(own);
  wire_->changes.fetch_add(1, std::memory_order_release);
  if (before != own.up() && other.notify) other.notify();
}

bool WirePort::carrier() const {
  std::lock_guard lock(mutex());
  return wire_->ends[side_ ^ 1].up();
}

void WirePort::setLink(bool up) {
  change([up](End& own) { own.link = up; });
}

void WirePort::start(uint64_t features) {
  features_ = features;
  change([](End& own) { own.started = true; });
}

void WirePort::stop() {
  used_.clear();
  leave();
}

void WirePort::hangUp() {
  leave();
}

void WirePort::release() {
  change([](End& own) { own.on = false; });
}

void WirePort::leave() {
  change([this](End& own) {
    // Also where it has not got as far as running.
    if (own.started) own.on = !own.link || !wire_->ends[side_ ^ 1].up();
    own.started = own.running = false;
    own.pairs.clear();
  });
}

void WirePort::use(const std::vector<unsigned>& pairs) {
  // What lies there from an earlier time.
  for (const unsigned pair : pairs) {
    if (!std::binary_search(used_.begin(), used_.end(), pair)) inbox_->queues[pair].discard();
  }
  used_ = pairs;
  change([&](End& own) {
    own.running = own.on = true;
    own.pairs = pairs;
  });
}

void WirePort::lookAtPeer() {
  flush();
  std::lock_guard lock(mutex());
  seen_ = wire_->changes.load(std::memory_order_acquire);
  const End& other = wire_->ends[side_ ^ 1];
  peer_ = other.running && other.up() ? other.inbox : nullptr;
  targets_ = peer_ ? other.pairs : std::vector<unsigned>();
  touched_.assign(peer_ ? peer_->queues.size() : 0, false);
}

Sent WirePort::send(unsigned pair, const std::vector<iovec>& parts, size_t total) {
  if (seen_ != wire_->changes.load(std::memory_order_acquire)) lookAtPeer();
  if (targets_.empty()) return Sent::dropped;
  const unsigned target = targets_[pair % targets_.size()];
  const Sent sent = peer_->queues[target].put(parts, total, features_);
  if (sent == Sent::sent) touched_[target] = anyTouched_ = true;
  return sent;
}

void WirePort::flush() {
  if (!anyTouched_) return;
  anyTouched_ = false;
  bool awaited = false;
  for (size_t target = 0; target < touched_.size(); target++) {
    if (!touched_[target]) continue;
    touched_[target] = false;
    awaited |= peer_->queues[target].show();
  }
  const uint64_t one = 1;
  if (awaited) (void)!write(peer_->bell.number(), &one, sizeof one);
}

}  // namespace

std::unique_ptr<NetPort> createWirePort(const NetPortOptions& options, std::string& reason) {
  std::lock_guard lock(mutex());
  std::shared_ptr<Wire> wire = wires()[options.name].lock();
  if (!wire) wires()[options.name] = wire = std::make_shared<Wire>();
  for (const unsigned side : {0u, 1u}) {
    if (!wire->ends[side].taken) return std::make_unique<WirePort>(options, wire, side);
  }
  reason = "the wire " + options.name + " has two ends already: a third function needs a wire of another name";
  return nullptr;
}

}  // namespace vhostd::ring
