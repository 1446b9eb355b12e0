#pragma once

#include <pthread.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend.h"
#include "dma-table.h"
#include "file.h"
#include "gate.h"
#include "split-queue.h"

namespace vhostd::ring {

struct QueueIndices {
  uint16_t queue;
  uint16_t lastAvail;
  uint16_t lastUsed;
};

struct QueueStats {
  uint64_t requests;
  /** Data moved, without headers and status bytes. */
  uint64_t bytes;
  uint64_t errors;
};

/**
 * The rings of one function: its DMA table, its virtqueues and the thread that serves them while it runs. All methods
 * belong to one controlling thread; none waits for more than one bounded piece of the worker's work.
 */
class RingFunction final : private ServiceContext {
 public:
  /** nullptr and the reason where the backend does not exist or refuses its parameters. */
  static std::unique_ptr<RingFunction> create(const std::string& backend, const Parameters& parameters, uint16_t queues,
                                              std::string& reason);
  ~RingFunction();

  uint16_t queues() const { return static_cast<uint16_t>(slots_.size()); }
  /** Non-blocking eventfd of the function: a signal is a notification of the queue. */
  int doorbell(uint16_t queue) const { return slots_[queue]->doorbell.number(); }
  /** Non-blocking eventfd, signalled when the worker has failed. */
  int events() const { return events_.number(); }

  /** 0 or -errno. The fd is borrowed. */
  int map(uint64_t iova, uint64_t size, int fd, uint64_t offset, bool writable);
  /** 0 or -errno. When it returns the range is not touched any more; a running ring in it fails the function. */
  int unmap(uint64_t iova, uint64_t size);
  void unmapAll();

  /** Empty, or why the ring cannot be used. */
  std::string check(const QueueConfig& config);
  /** Sets a ring up; served from `start` on, or at once while running. Empty, or why not. */
  std::string activate(uint16_t queue, const QueueConfig& config, uint64_t features);
  /** Starts the worker. Empty, or why not: a failure lasts until it is stopped. */
  std::string start(uint64_t features);
  /** The queue's calls go to a duplicate of `fd` from now on; -1 for nowhere. */
  bool setCall(uint16_t queue, int fd);
  /** Empty, or which parameter was refused and why. */
  std::string configure(const Parameters& parameters);

  /** Asks the worker to end: after what it has taken (`drain`), or at once. */
  void requestStop(bool drain);
  /** True when the worker has ended, all rings are inactive and a failure is forgotten; waits that long at most. */
  bool tryStop(int milliseconds);

  /** Of the rings that were active when the worker was stopped last. */
  const std::vector<QueueIndices>& indices() const { return indices_; }
  /** Why the function needs a reset; empty where it does not. */
  std::string failure() const;
  QueueStats stats(uint16_t queue) const;

 private:
  struct Slot {
    SplitQueue queue;
    File doorbell;
    std::shared_ptr<File> call;
    /** What the worker has to signal when its turn is over. */
    std::shared_ptr<File> signalTo;
    /** Notified, and not yet found empty. */
    std::atomic<bool> ready{false};
    std::atomic<uint64_t> requests{0};
    std::atomic<uint64_t> bytes{0};
    std::atomic<uint64_t> errors{0};
  };
  enum class Stop { no, drain, now };

  RingFunction() = default;
  bool open(std::string& reason);

  void run();
  bool turn();
  bool serveQueue(Slot& slot, uint16_t index);
  void publish();
  void signalCalls();
  void wait();
  Chain* takeChain();
  void releaseChain(Chain* chain);

  const std::vector<iovec>* vectors(const Chain& chain, Direction direction, uint64_t skip, uint64_t length) override;
  bool copyFrom(const Chain& chain, uint64_t skip, void* to, size_t length) override;
  bool copyTo(const Chain& chain, uint64_t skip, const void* from, size_t length) override;
  void complete(Chain* chain, uint32_t written, uint64_t bytes, bool error) override;
  void abandon(Chain* chain) override;
  void fail(std::string reason) override;
  bool giveWay() override;
  void blocking(const std::function<void()>& work) override;

  std::vector<std::unique_ptr<Slot>> slots_;
  std::unique_ptr<RingBackend> backend_;
  DmaTable dma_;
  Gate gate_;
  File events_;
  File wake_;
  File epoll_;

  pthread_t thread_{};
  bool threadStarted_ = false;
  std::atomic<Stop> stop_{Stop::no};
  std::atomic<bool> failed_{false};
  std::atomic<bool> ended_{false};
  mutable std::mutex failureMutex_;
  std::string failure_;
  std::vector<QueueIndices> indices_;

  std::vector<std::unique_ptr<Chain>> chains_;
  std::vector<Chain*> freeChains_;
  std::vector<iovec> vectors_;
  /** Bytes moved in this turn: completions are shown after a while, however many requests are waiting. */
  uint64_t turnBytes_ = 0;
};

}  // namespace vhostd::ring
