#pragma once

#include <pthread.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend.h"
#include "dirty-log.h"
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

/** What a device needs to go on with a ring. */
struct QueueState {
  uint16_t queue;
  uint16_t lastAvail;
  uint16_t lastUsed;
  /** Heads. */
  std::vector<uint16_t> inFlight;
};

struct QueueStats {
  /** Chains taken. */
  uint64_t received;
  /** Chains given back. */
  uint64_t completed;
  /** Of these, malformed ones and those whose request failed. */
  uint64_t bad;
  /** Data moved, without headers and status bytes. */
  uint64_t bytes;
};

/** A part of a dirty map, in the DMA table of who lends it. Bytes. */
struct LogPlace {
  uint64_t iova;
  uint64_t length;
};

/** How the worker is to end. */
enum class Stop {
  no,
  /** After the requests it is at; rings and kept requests stay, to go on with at the next start. */
  park,
  /** After all that it has taken. */
  finish,
  /** At once. */
  drop,
};

/**
 * The rings of one function: its DMA table, its virtqueues and the thread that serves them while it runs. All methods
 * belong to one controlling thread. Those that change what the worker uses wait for its piece of work, which may be a
 * disk that hangs, unless they are called between `tryEnter` and `leave`; the others never wait.
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
  /** Non-blocking eventfd, signalled when there may be a `failure`, something for `takeRequests` or a new `carrier`. */
  int events() const { return events_.number(); }

  /** Control's turn, if it is to be had in that time. After false the worker gives way: try again or `withdraw`. */
  bool tryEnter(int milliseconds) { return gate_.tryEnterControl(std::chrono::milliseconds(milliseconds)); }
  void leave() { gate_.leaveControl(); }
  void withdraw() { gate_.withdraw(); }

  /** 0 or -errno. The fd is borrowed. */
  int map(uint64_t iova, uint64_t size, int fd, uint64_t offset, bool writable);
  /**
   * 0 or -errno. When it returns the range is not touched any more; a running ring in it fails the function. Its pages
   * are given back when `unmapping()` is false.
   */
  int unmap(uint64_t iova, uint64_t size);
  void unmapAll();
  bool unmapping() const { return *unmapsUnderWay_ > 0; }

  /** Sets a ring up that is not active; served from `start` on, or at once while running. Empty, or why not. */
  std::string activate(uint16_t queue, const QueueConfig& config, uint64_t features);
  /** Starts the worker, also after it was parked. Empty, or why not: a failure lasts until it is stopped. */
  std::string start(uint64_t features);
  /** The queue's calls go to a duplicate of `fd`, -1 for nowhere; one may be on its way to the former. Never waits. */
  bool setCall(uint16_t queue, int fd);
  /** The same with a descriptor that is taken: it cannot fail. */
  void takeCall(uint16_t queue, File call);
  /**
   * Signals of `fd`, of which a duplicate is kept and never read, notify the queue too; -1 for no longer. 0 or -errno:
   * the former stays then. Never waits.
   */
  int setKick(uint16_t queue, int fd);
  /** When it returns no chain is taken until `unquiesce`, however often the worker is stopped and started. */
  void quiesce();
  /**
   * While quiesced: true when no call holds the worker up any more, whoever has filled the eventfd; asked until then.
   * Never waits.
   */
  bool passCalls();
  /** Never waits. */
  void unquiesce();
  /** Chains that were taken and not yet shown to the driver as used. Never waits. */
  uint32_t inFlight() const { return inFlight_.load(std::memory_order_acquire); }
  /** Of the active rings; they stand still while there is no worker, or nothing for it to do. */
  std::vector<QueueState> rings();
  /** Empty, or which parameter was refused and why. */
  std::string configure(const Parameters& parameters);

  /**
   * Each page of the range that the function writes from now on is marked, whether it is reset or not, until `stopLog`
   * or another start.
   * @param places of the map, in memory of `lender`, which need not outlive it; nullptr for a map of its own
   * @returns empty, or why not: what was before goes on then
   */
  std::string startLog(LogMap map, const LogRange& range, const std::vector<LogPlace>* places, RingFunction* lender);
  /** What was written before is marked when it returns. */
  void stopLog();
  /** Nothing is marked any more when it returns; the log stays, to be stopped. Never waits. */
  void cutLog(const std::string& reason) {
    if (log_) log_->cut(reason);
  }
  /** nullptr where pages are not marked. Never waits. */
  DirtyLog* log() { return log_.get(); }

  /** Asks the worker to end. */
  void requestStop(Stop how);
  /** True when the worker has ended, all rings are inactive and a failure is forgotten; waits that long at most. */
  bool tryStop(int milliseconds);
  /** True when the worker has ended; all stays as it is. Waits that long at most. */
  bool tryPark(int milliseconds);

  /** Of the rings that were active when the worker was stopped last. */
  const std::vector<QueueIndices>& indices() const { return indices_; }
  /** Requests for control, since the last time. Never waits. */
  std::vector<ForwardedRequest> takeRequests() { return backend_->takeRequests(); }
  /** What is to be written to a request's buffers, as far as there is room. Unknown ids are ignored. Never waits. */
  void answer(uint64_t id, std::vector<uint8_t> bytes);

  /** Whether the backend reaches the world outside. Never waits. */
  bool carrier() const { return backend_->carrier(); }
  /** What the backend knows of itself, by name. Never waits. */
  std::map<std::string, int64_t> info() const { return backend_->info(); }

  /** Why the function needs a reset; empty where it does not. */
  std::string failure() const;
  QueueStats stats(uint16_t queue) const;

 private:
  struct Slot {
    SplitQueue queue;
    File doorbell;
    /** Control's: an eventfd of someone else that notifies too. */
    File kick;
    /** By `callMutex_`. */
    std::shared_ptr<File> call;
    /** What the worker has to signal when its turn is over. */
    std::shared_ptr<File> signalTo;
    /** Notified, and not yet found empty. */
    std::atomic<bool> ready{false};
    std::atomic<uint64_t> received{0};
    std::atomic<uint64_t> completed{0};
    std::atomic<uint64_t> bad{0};
    std::atomic<uint64_t> bytes{0};
  };
  /** In the place of a queue's number: control wants the worker to look around. */
  static constexpr uint32_t kWakeEvent = UINT32_MAX;
  /** Behind the queues' numbers: those of the backend's sources. */
  static constexpr uint32_t kFirstSource = 1 << 16;

  RingFunction() = default;
  bool open(std::string& reason);
  static void signalOwn(const File& file);
  std::string watchSources();
  void lookAround();

  void run();
  bool turn();
  bool serveQueue(Slot& slot, uint16_t index);
  bool arm(Slot& slot, uint16_t index);
  void serveAgain(Slot& slot, uint16_t index);
  Pop popNext(Slot& slot, Chain& chain, std::string& reason);
  uint8_t* inOnePiece(const Chain& chain, Direction direction, uint64_t skip, uint64_t length) const;
  void publish();
  void setLog(std::shared_ptr<DirtyLog> log);
  std::shared_ptr<DirtyLog> lendLog(LogMap map, const LogRange& range, const std::vector<LogPlace>& places,
                                    std::string& reason);
  void cutLogs(const DmaMapping& gone);
  void flushLog();
  void markAhead();
  void note(uint64_t iova, uint64_t length) {
    if (log_) log_->wrote(iova, length);
  }
  void signalCalls();
  void signalCall(int call);
  void betweenTurns(bool more);
  void collectNotifications(int timeout);
  int untilDue() const;
  Chain* takeChain();
  void releaseChain(Chain* chain);

  const std::vector<iovec>* vectors(const Chain& chain, Direction direction, uint64_t skip, uint64_t length) override;
  bool copyFrom(const Chain& chain, uint64_t skip, void* to, size_t length) override;
  bool copyTo(const Chain& chain, uint64_t skip, const void* from, size_t length) override;
  template <typename Copy>
  bool copyParts(const Chain& chain, Direction direction, uint64_t skip, size_t length, Copy copy);
  Chain* pull(uint16_t queue) override;
  void putBack(Chain* chain) override;
  bool stocked(uint16_t queue) const override;
  void restock(uint16_t queue) override { slots_[queue]->ready = true; }
  bool active(uint16_t queue) const override { return queue < slots_.size() && slots_[queue]->queue.active(); }
  bool polling() const override { return polling_; }
  bool pressed() const override { return failed_ || stop_ != Stop::no || gate_.wanted(); }
  void complete(Chain* chain, uint32_t written, uint64_t bytes, bool error) override;
  void abandon(Chain* chain) override;
  void callControl() override;
  void fail(std::string reason) override;
  bool giveWay() override;
  void blocking(const std::function<void()>& work) override;

  std::vector<std::unique_ptr<Slot>> slots_;
  std::unique_ptr<RingBackend> backend_;
  DmaTable dma_;
  /** Changed inside control's turns. */
  std::shared_ptr<DirtyLog> log_;
  /** Control's: logs of others that lie in memory of this table. */
  std::vector<std::weak_ptr<DirtyLog>> lent_;
  Gate gate_;
  /** Not the gate: where calls go can be changed while the worker hangs in the disk. */
  std::mutex callMutex_;
  const std::shared_ptr<std::atomic<int>> unmapsUnderWay_ = std::make_shared<std::atomic<int>>(0);
  File events_;
  File wake_;
  File epoll_;
  /** Files of the backend that the epoll waits for. */
  std::vector<int> sources_;

  pthread_t thread_{};
  bool threadStarted_ = false;
  std::atomic<Stop> stop_{Stop::no};
  std::atomic<bool> quiesced_{false};
  /** The worker may be in a write that blocks, unless it sees afterwards that it is to stop or quiesced. */
  std::atomic<bool> calling_{false};
  /** Written inside turns only. */
  std::atomic<uint32_t> inFlight_{0};
  /** Chains that ended in this turn: they are in flight until the driver can see it. */
  uint32_t endedInTurn_ = 0;
  std::atomic<bool> failed_{false};
  std::atomic<bool> ended_{false};
  mutable std::mutex failureMutex_;
  std::string failure_;
  std::vector<QueueIndices> indices_;

  std::vector<std::unique_ptr<Chain>> chains_;
  std::vector<Chain*> freeChains_;
  std::vector<iovec> vectors_;
  /** As the worker's last turn left it: when the backend wants to be resumed; more than one ring is active. */
  int64_t due_ = -1;
  bool severalActive_ = false;
  /** Bytes moved in this turn: completions are shown after a while, however many requests are waiting. */
  uint64_t turnBytes_ = 0;
  /** Chains given back in this turn. */
  uint32_t turnChains_ = 0;
  /** Turns in a row in which there were none. While they are few the worker is `polling`: it asks for no notification. */
  unsigned idleTurns_ = 0;
  bool polling_ = false;
  /** Until notifications are looked at although there is work. */
  unsigned unnotifiedTurns_ = 0;
};

}  // namespace vhostd::ring
