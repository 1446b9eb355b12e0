#include <algorithm>
#include <cstdio>

#include "ring-function.h"

/** What a function has to do with dirty logs: its own, and those of others in its memory. */
namespace vhostd::ring {
namespace {

std::string describe(const LogPlace& place) {
  char text[64];
  snprintf(text, sizeof text, "0x%llx+0x%llx", static_cast<unsigned long long>(place.iova),
           static_cast<unsigned long long>(place.length));
  return text;
}

}  // namespace

std::string RingFunction::startLog(LogMap map, const LogRange& range, const std::vector<LogPlace>* places,
                                   RingFunction* lender) {
  ControlTurn turn(gate_);
  std::shared_ptr<DirtyLog> log;
  if (places == nullptr) {
    log = DirtyLog::own(map, range);
    if (!log) return "there is no memory for a map of " + std::to_string(range.mapBytes(map)) + " bytes";
  } else {
    std::string reason;
    log = lender->lendLog(map, range, *places, reason);
    if (!log) return reason;
  }
  setLog(std::move(log));
  return {};
}

void RingFunction::stopLog() {
  ControlTurn turn(gate_);
  if (!log_) return;
  flushLog();
  setLog(nullptr);
}

/** Inside control's turn. */
void RingFunction::setLog(std::shared_ptr<DirtyLog> log) {
  log_ = std::move(log);
  for (const auto& slot : slots_) slot->queue.track(log_.get());
}

/** Control is the only one that changes the table: to look at it, it waits for nobody. */
std::shared_ptr<DirtyLog> RingFunction::lendLog(LogMap map, const LogRange& range, const std::vector<LogPlace>& places,
                                                std::string& reason) {
  std::vector<iovec> hosts;
  for (const LogPlace& place : places) {
    if (dma_.translate(place.iova, place.length, true, hosts)) continue;
    reason = "the piece " + describe(place) + " of the map is not in mapped, writable memory";
    return nullptr;
  }
  const auto ended = [](const std::weak_ptr<DirtyLog>& log) { return log.expired(); };
  lent_.erase(std::remove_if(lent_.begin(), lent_.end(), ended), lent_.end());
  auto log = std::make_shared<DirtyLog>(map, range, hosts);
  lent_.push_back(log);
  return log;
}

/** Nobody marks pages in memory that is no longer in the table, before it is unmapped. */
void RingFunction::cutLogs(const DmaMapping& gone) {
  for (const std::weak_ptr<DirtyLog>& lent : lent_) {
    if (const auto log = lent.lock()) log->cutWithin(gone.host, gone.size, "memory of the dirty map was unmapped");
  }
}

/** Marks what was written so far. Inside a turn. */
void RingFunction::flushLog() {
  if (!log_->flush()) fail(log_->lost());
}

/** Marks the pages of the data and of the used elements that `publish` is going to announce. */
void RingFunction::markAhead() {
  for (size_t index = 0; index < slots_.size() && !failed_; index++) {
    SplitQueue& queue = slots_[index]->queue;
    if (!queue.active() || queue.store()) continue;
    fail("memory of the used ring of queue " + std::to_string(index) + " is gone");
  }
  flushLog();
}

}  // namespace vhostd::ring
