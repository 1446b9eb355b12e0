#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>

namespace vhostd::ring {

/**
 * The lock between one worker and the one thread that controls it. The worker holds it while it serves and asks
 * `wanted()` after every bounded piece of work; control waits for no more than that piece, however busy the rings are.
 * A piece may be a read of a disk that hangs: who must not wait for that tries, and the worker stays away from its next
 * piece until the attempt has succeeded or was given up.
 */
class Gate {
 public:
  /** Control waits for the gate: the worker leaves at the next piece of work. */
  bool wanted() const { return waiting_.load(std::memory_order_relaxed) != 0; }

  /** By the worker: control goes first. */
  void enterWorker() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !held_ && waiting_.load(std::memory_order_relaxed) == 0; });
    held_ = true;
  }

  void leaveWorker() { release(); }

  /** Turns nest: a turn inside a turn waits for nothing. */
  void enterControl() {
    if (depth_++ > 0) return;
    std::unique_lock lock(mutex_);
    waiting_.fetch_add(1, std::memory_order_relaxed);
    changed_.wait(lock, [this] { return !held_; });
    waiting_.fetch_sub(1, std::memory_order_relaxed);
    held_ = true;
  }

  /** The same, waiting that long at most. After false the gate stays wanted: try again or `withdraw`. */
  bool tryEnterControl(std::chrono::milliseconds longest) {
    if (depth_ > 0) {
      depth_++;
      return true;
    }
    std::unique_lock lock(mutex_);
    if (!trying_) waiting_.fetch_add(1, std::memory_order_relaxed);
    trying_ = true;
    if (!changed_.wait_for(lock, longest, [this] { return !held_; })) return false;
    waiting_.fetch_sub(1, std::memory_order_relaxed);
    trying_ = false;
    held_ = true;
    depth_ = 1;
    return true;
  }

  void withdraw() {
    {
      std::lock_guard lock(mutex_);
      if (trying_) waiting_.fetch_sub(1, std::memory_order_relaxed);
      trying_ = false;
    }
    changed_.notify_all();
  }

  void leaveControl() {
    if (--depth_ == 0) release();
  }

 private:
  void release() {
    {
      std::lock_guard lock(mutex_);
      held_ = false;
    }
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  bool held_ = false;
  std::atomic<int> waiting_{0};
  /** Control's own: its turns that are open, and whether an attempt is under way. */
  int depth_ = 0;
  bool trying_ = false;
};

/** Control's turn, for a scope. */
class ControlTurn {
 public:
  explicit ControlTurn(Gate& gate) : gate_(gate) { gate_.enterControl(); }
  ~ControlTurn() { gate_.leaveControl(); }
  ControlTurn(const ControlTurn&) = delete;
  ControlTurn& operator=(const ControlTurn&) = delete;

 private:
  Gate& gate_;
};

}  // namespace vhostd::ring
