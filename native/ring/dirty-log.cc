#include "dirty-log.h"

#include <sys/mman.h>

#include <utility>

#include "../guard.h"

namespace vhostd::ring {
namespace {

/** More than a turn notes, mostly. */
constexpr size_t kUsualRuns = 256;

}  // namespace

DirtyLog::DirtyLog(LogMap map, const LogRange& range, const std::vector<iovec>& places)
    : map_(map), range_(range), pageShift_(static_cast<unsigned>(__builtin_ctzll(range.pageSize))) {
  uint64_t start = 0;
  for (const iovec& place : places) {
    places_.push_back({start, place.iov_len, static_cast<uint8_t*>(place.iov_base)});
    start += place.iov_len;
  }
  noted_.reserve(kUsualRuns);
}

std::shared_ptr<DirtyLog> DirtyLog::own(LogMap map, const LogRange& range) {
  const uint64_t bytes = range.mapBytes(map);
  // Of a large map hardly anything is ever touched.
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  auto log = std::make_shared<DirtyLog>(map, range, std::vector<iovec>{{memory, bytes}});
  log->owned_ = true;
  return log;
}

DirtyLog::~DirtyLog() {
  if (owned_) munmap(places_[0].host, places_[0].length);
}

bool DirtyLog::flush() {
  if (noted_.empty()) return true;
  bool good = true;
  {
    std::lock_guard lock(mutex_);
    if (lost_.empty()) {
      good = guarded([this] {
        for (const Run& run : noted_) mark(run);
      });
      if (!good) lost_ = "memory of the dirty map is gone";
    }
  }
  noted_.clear();
  return good;
}

/** Touches nothing but the map: it is called with faults caught. */
void DirtyLog::mark(const Run& run) const {
  const unsigned shift = map_ == LogMap::bitmap ? 3 : 0;
  const uint64_t firstByte = run.first >> shift;
  const uint64_t lastByte = run.last >> shift;
  const Place* place = &*std::prev(std::upper_bound(places_.begin(), places_.end(), firstByte,
                                                    [](uint64_t at, const Place& one) { return at < one.start; }));
  for (uint64_t byte = firstByte; byte <= lastByte; place++) {
    const uint64_t end = std::min(lastByte + 1, place->start + place->length);
    for (uint8_t* at = place->host + (byte - place->start); byte < end; byte++, at++) {
#ifdef __SANITIZE_THREAD__
      // A fault must not come while TSan holds its lock for what follows.
      (void)__atomic_load_n(at, __ATOMIC_RELAXED);
#endif
      if (map_ == LogMap::bytemap) {
        __atomic_store_n(at, uint8_t{1}, __ATOMIC_RELEASE);
        continue;
      }
      unsigned bits = 0xff;
      if (byte == firstByte) bits &= 0xff << run.first % 8;
      if (byte == lastByte) bits &= 0xff >> (7 - run.last % 8);
      // Whether the bit is set already or not: it may just be cleared, before the data was written.
      __atomic_fetch_or(at, static_cast<uint8_t>(bits), __ATOMIC_SEQ_CST);
    }
  }
}

void DirtyLog::cut(const std::string& reason) {
  std::lock_guard lock(mutex_);
  if (lost_.empty()) lost_ = reason;
}

void DirtyLog::cutWithin(const uint8_t* host, uint64_t size, const std::string& reason) {
  const bool touched = std::any_of(places_.begin(), places_.end(), [&](const Place& place) {
    return place.host < host + size && host < place.host + place.length;
  });
  if (touched) cut(reason);
}

std::string DirtyLog::lost() const {
  std::lock_guard lock(mutex_);
  return lost_;
}

void DirtyLog::take(uint64_t offset, uint64_t length, uint8_t* to) {
  uint8_t* const from = places_[0].host + offset;
  for (uint64_t at = 0; at < length; at++) {
    // Pages of the map that nobody marked in need no memory.
    const bool marked = __atomic_load_n(from + at, __ATOMIC_RELAXED) != 0;
    to[at] = marked ? __atomic_exchange_n(from + at, uint8_t{0}, __ATOMIC_SEQ_CST) : 0;
  }
}

}  // namespace vhostd::ring
