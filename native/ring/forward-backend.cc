#include <algorithm>
#include <deque>
#include <map>
#include <mutex>
#include <utility>

#include "backend.h"

namespace vhostd::ring {
namespace {

/** Of one chain, in each direction. */
constexpr uint64_t kMostBytes = 1 << 20;
/** Of all chains until they are given back, in both directions: a ring full of the largest must not fill this process. */
constexpr uint64_t kMostHeldBytes = 64 << 20;

/** Hands chains to control, which answers them when it likes. */
class ForwardBackend final : public RingBackend {
 public:
  std::string set(const std::string&, const Parameter&) override { return "there are no parameters"; }
  std::string missing() const override { return {}; }
  void start(uint64_t) override {}
  void serve(Chain* chain, ServiceContext& context) override;
  int64_t due() const override;
  void resume(int64_t now, ServiceContext& context) override;
  /** Only what is answered: nobody knows when the rest will be. */
  void drain(ServiceContext& context) override { resume(0, context); }
  void drop() override;
  std::vector<ForwardedRequest> takeRequests() override;
  bool answer(uint64_t id, std::vector<uint8_t> bytes) override;
  std::map<std::string, int64_t> info() const override;

 private:
  /** A chain that was taken off its ring. */
  struct Request {
    Chain* chain;
    /** monotonicNow. */
    int64_t taken;
  };
  struct Answer : Request {
    std::vector<uint8_t> bytes;
  };
  /** How long requests took, from the ring and back to it. ns. */
  struct Times {
    uint64_t requests = 0;
    int64_t total = 0;
    /** In which at least one was under way. */
    int64_t busy = 0;
    uint64_t underWay = 0;
    int64_t busySince = 0;
  };
  static std::string refusal(const Chain& chain);
  static uint64_t size(const Chain& chain) { return chain.readableSize + chain.writableSize; }
  bool hold(uint64_t bytes);
  void done(const Answer& answer, uint64_t bytes);
  bool takeAnswer(Answer& answer);

  /** For all below; held for list operations only. */
  mutable std::mutex mutex_;
  uint64_t nextId_ = 1;
  std::vector<ForwardedRequest> waiting_;
  /** Waiting, with control, and answered. */
  uint64_t heldBytes_ = 0;
  std::map<uint64_t, Request> unanswered_;
  std::deque<Answer> answers_;
  Times times_;
};

/** Empty, or why the chain is not served. */
std::string ForwardBackend::refusal(const Chain& chain) {
  const std::string name = "request " + std::to_string(chain.head) + " of queue " + std::to_string(chain.queue);
  if (chain.misordered) return name + " has a readable buffer behind a writable one";
  const uint64_t bytes = std::max(chain.readableSize, chain.writableSize);
  if (bytes <= kMostBytes) return {};
  return name + " has buffers of " + std::to_string(bytes) + " bytes, at most " + std::to_string(kMostBytes);
}

void ForwardBackend::serve(Chain* chain, ServiceContext& context) {
  const int64_t now = monotonicNow();
  const std::string reason = refusal(*chain);
  if (!reason.empty()) return context.fail(reason);
  if (!hold(size(*chain))) {
    return context.fail("more than " + std::to_string(kMostHeldBytes) + " bytes of requests are unanswered");
  }
  ForwardedRequest request{0, chain->queue, std::vector<uint8_t>(chain->readableSize), chain->writableSize};
  if (!context.copyFrom(*chain, 0, request.readable.data(), request.readable.size())) {
    return context.fail("a readable buffer of request " + std::to_string(chain->head) + " of queue " +
                        std::to_string(chain->queue) + " is not in mapped memory");
  }
  {
    std::lock_guard lock(mutex_);
    request.id = nextId_++;
    unanswered_[request.id] = {chain, now};
    waiting_.push_back(std::move(request));
    if (times_.underWay++ == 0) times_.busySince = now;
  }
  context.callControl();
}

bool ForwardBackend::hold(uint64_t bytes) {
  std::lock_guard lock(mutex_);
  if (bytes > kMostHeldBytes - heldBytes_) return false;
  heldBytes_ += bytes;
  return true;
}

int64_t ForwardBackend::due() const {
  std::lock_guard lock(mutex_);
  return answers_.empty() ? -1 : 0;
}

void ForwardBackend::resume(int64_t, ServiceContext& context) {
  for (Answer answer; takeAnswer(answer);) {
    Chain* chain = answer.chain;
    const size_t written = std::min<uint64_t>(answer.bytes.size(), chain->writableSize);
    if (!context.copyTo(*chain, 0, answer.bytes.data(), written)) {
      return context.fail("a writable buffer of request " + std::to_string(chain->head) + " of queue " +
                          std::to_string(chain->queue) + " is not in mapped memory");
    }
    const uint64_t held = size(*chain);
    context.complete(chain, static_cast<uint32_t>(written), chain->readableSize + written, false);
    done(answer, held);
    if (!context.giveWay()) return;
  }
}

/** The chain is gone. @param bytes that were held for it */
void ForwardBackend::done(const Answer& answer, uint64_t bytes) {
  const int64_t now = monotonicNow();
  std::lock_guard lock(mutex_);
  heldBytes_ -= bytes;
  times_.requests++;
  times_.total += now - answer.taken;
  if (--times_.underWay == 0) times_.busy += now - times_.busySince;
}

bool ForwardBackend::takeAnswer(Answer& answer) {
  std::lock_guard lock(mutex_);
  if (answers_.empty()) return false;
  answer = std::move(answers_.front());
  answers_.pop_front();
  return true;
}

void ForwardBackend::drop() {
  std::lock_guard lock(mutex_);
  waiting_.clear();
  heldBytes_ = 0;
  unanswered_.clear();
  answers_.clear();
  if (times_.underWay > 0) times_.busy += monotonicNow() - times_.busySince;
  times_.underWay = 0;
}

std::vector<ForwardedRequest> ForwardBackend::takeRequests() {
  std::lock_guard lock(mutex_);
  return std::exchange(waiting_, {});
}

bool ForwardBackend::answer(uint64_t id, std::vector<uint8_t> bytes) {
  std::lock_guard lock(mutex_);
  const auto request = unanswered_.find(id);
  if (request == unanswered_.end()) return false;
  answers_.push_back({request->second, std::move(bytes)});
  unanswered_.erase(request);
  return true;
}

std::map<std::string, int64_t> ForwardBackend::info() const {
  std::lock_guard lock(mutex_);
  const int64_t open = times_.underWay == 0 ? 0 : monotonicNow() - times_.busySince;
  return {
      {"requests", static_cast<int64_t>(times_.requests)},
      {"microseconds", times_.total / 1000},
      {"busyMicroseconds", (times_.busy + open) / 1000},
  };
}

}  // namespace

std::unique_ptr<RingBackend> createForwardBackend() {
  return std::make_unique<ForwardBackend>();
}

}  // namespace vhostd::ring
