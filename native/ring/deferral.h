#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "chain.h"

namespace vhostd::ring {

/** Keeps chains until their time has come, in order or shuffled. For devices that are slow on purpose. */
class Deferral {
 public:
  void put(Chain* chain, int64_t due) {
    chain->due = due;
    kept_.push_back(chain);
  }

  /** Some time from 0 to `most`. */
  int64_t sometime(int64_t most) { return std::uniform_int_distribution<int64_t>(0, most)(random_); }

  /** Nothing waits longer than until `latest`. */
  void hasten(int64_t latest) {
    for (Chain* chain : kept_) chain->due = std::min(chain->due, latest);
  }

  /** The earliest time; -1 where nothing is kept. */
  int64_t due() const {
    int64_t earliest = -1;
    for (const Chain* chain : kept_) {
      if (earliest < 0 || chain->due < earliest) earliest = chain->due;
    }
    return earliest;
  }

  /** One chain whose time has come, or nullptr. */
  Chain* take(int64_t now, bool shuffled) {
    size_t candidates = 0;
    size_t chosen = 0;
    for (size_t index = 0; index < kept_.size(); index++) {
      if (kept_[index]->due > now) continue;
      candidates++;
      // Each candidate is as likely as the others.
      if (candidates == 1 || (shuffled && random_() % candidates == 0)) chosen = index;
    }
    if (candidates == 0) return nullptr;
    Chain* chain = kept_[chosen];
    kept_.erase(kept_.begin() + static_cast<std::ptrdiff_t>(chosen));
    return chain;
  }

  void drop() { kept_.clear(); }

 private:
  std::vector<Chain*> kept_;
  std::minstd_rand random_{std::random_device{}()};
};

}  // namespace vhostd::ring
