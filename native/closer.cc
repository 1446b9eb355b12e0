#include "closer.h"

#include <unistd.h>

#include <chrono>

#include "symbols.h"
#include "thread.h"

namespace vhostd {
namespace {

/** Lanes that may be held up at the same time before everybody is. */
constexpr unsigned MOST_WORKERS = 256;

}  // namespace

Closer& Closer::shared() {
  static Closer* const closer = new Closer(MOST_WORKERS);
  return *closer;
}

void Closer::close(uint64_t number, int fd) {
  std::lock_guard<std::mutex> lock(mutex);
  Lane& lane = lanes[number];
  const bool isReady = !lane.busy && lane.waiting.empty();
  lane.waiting.push_back(fd);
  total++;
  if (isReady) ready.push_back(number);
  if (isReady && handOver()) return;
  // Where no thread can be had the files wait for the next close to find one: never are they closed here.
  if (!dispatching) dispatching = startThread(nullptr, dispatch, this) == 0;
  arrived.notify_one();
}

bool Closer::handOver() {
  if (handed == idle) return false;
  handed++;
  handedOver.notify_one();
  return true;
}

size_t Closer::pending(uint64_t number) {
  std::lock_guard<std::mutex> lock(mutex);
  if (number == 0) return total;
  auto found = lanes.find(number);
  return found == lanes.end() ? 0 : found->second.waiting.size() + found->second.busy;
}

bool Closer::wait(int milliseconds) {
  std::unique_lock<std::mutex> lock(mutex);
  return ended.wait_for(lock, std::chrono::milliseconds(milliseconds), [this] { return total == 0; });
}

void* Closer::dispatch(void* self) {
  nameThread("vhostd-closer");
  Closer& closer = *static_cast<Closer*>(self);
  std::unique_lock<std::mutex> lock(closer.mutex);
  for (;;) closer.dispatchReady(lock);
}

void Closer::dispatchReady(std::unique_lock<std::mutex>& lock) {
  arrived.wait(lock, [this] { return !ready.empty(); });
  if (workers + handed > 0) {
    const uint64_t before = done;
    ended.wait_for(lock, std::chrono::milliseconds(PATIENCE), [this] { return ready.empty() || workers + handed == 0; });
    // One of the workers makes progress, or nothing is left to do.
    if (ready.empty() || (workers > 0 && done != before)) return;
  }
  if (handOver()) return;
  if (workers + idle < most && startThread(nullptr, work, this) == 0) {
    workers++;
    return;
  }
  ended.wait_for(lock, std::chrono::milliseconds(PATIENCE));
}

void* Closer::work(void* self) {
  nameThread("vhostd-close");
  Closer& closer = *static_cast<Closer*>(self);
  std::unique_lock<std::mutex> lock(closer.mutex);
  for (;;) {
    while (!closer.ready.empty()) closer.closeReady(lock);
    closer.workers--;
    closer.idle++;
    closer.ended.notify_all();
    const bool more =
        closer.handedOver.wait_for(lock, std::chrono::milliseconds(IDLE), [&closer] { return closer.handed > 0; });
    closer.idle--;
    if (!more) return nullptr;
    closer.handed--;
    closer.workers++;
  }
}

void Closer::closeReady(std::unique_lock<std::mutex>& lock) {
  const uint64_t number = ready.front();
  ready.pop_front();
  Lane& lane = lanes[number];
  const int fd = lane.waiting.front();
  lane.waiting.pop_front();
  lane.busy = true;
  lock.unlock();
  vhostd_close(fd);
  lock.lock();
  lane.busy = false;
  done++;
  total--;
  if (lane.waiting.empty()) lanes.erase(number);
  else ready.push_back(number);
  if (ready.empty() || total == 0) ended.notify_all();
}

}  // namespace vhostd

int64_t vhostd_new_lane() {
  static std::mutex one;
  static int64_t last = 0;
  std::lock_guard<std::mutex> lock(one);
  return ++last;
}

int32_t vhostd_close_later(int64_t lane, int32_t fd) {
  vhostd::Closer::shared().close(static_cast<uint64_t>(lane), fd);
  return 0;
}

int64_t vhostd_pending_closes(int64_t lane) {
  return static_cast<int64_t>(vhostd::Closer::shared().pending(static_cast<uint64_t>(lane)));
}

int32_t vhostd_wait_for_closes(int32_t milliseconds) { return vhostd::Closer::shared().wait(milliseconds); }
