#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>

namespace vhostd::ring {

/**
 * The lock between one worker and those who control it. The worker holds it while it serves and asks `wanted()` after
 * every bounded piece of work; whoever controls never waits for more than that piece, however busy the rings are.
 */
class Gate {
 public:
  /** Control waits for the gate: the worker leaves at the next piece of work. */
  bool wanted() const { return waiting_.load(std::memory_order_relaxed) != 0; }

  /** By the worker: those who control go first. */
  void enterWorker() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !held_ && waiting_.load(std::memory_order_relaxed) == 0; });
    held_ = true;
  }

  void enterControl() {
    std::unique_lock lock(mutex_);
    waiting_.fetch_add(1, std::memory_order_relaxed);
    changed_.wait(lock, [this] { return !held_; });
    waiting_.fetch_sub(1, std::memory_order_relaxed);
    held_ = true;
  }

  void leave() {
    {
      std::lock_guard lock(mutex_);
      held_ = false;
    }
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool held_ = false;
  std::atomic<int> waiting_{0};
};

/** Control's turn, for a scope. */
class ControlTurn {
 public:
  explicit ControlTurn(Gate& gate) : gate_(gate) { gate_.enterControl(); }
  ~ControlTurn() { gate_.leave(); }
  ControlTurn(const ControlTurn&) = delete;
  ControlTurn& operator=(const ControlTurn&) = delete;

 private:
  Gate& gate_;
};

}  // namespace vhostd::ring
