#pragma once

#include <sys/uio.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace vhostd::ring {

/** How a map says that a page was written: a bit is set, bit n of byte n / 8 for page n; or byte n is 1. */
enum class LogMap { bitmap, bytemap };

/** Memory whose pages are marked, as the function addresses it. Bytes: multiples of the page size, a power of two. */
struct LogRange {
  uint64_t address;
  uint64_t length;
  uint64_t pageSize;

  /** Of the map. */
  uint64_t mapBytes(LogMap map) const {
    const uint64_t pages = length / pageSize;
    return map == LogMap::bitmap ? pages / 8 + (pages % 8 != 0) : pages;
  }
};

/**
 * Where a function marks the pages that it writes, in memory of its own or of someone else, who reads and clears it at
 * any time. Writes are noted, and marked together: after the data is written, as a mark that comes first could be read,
 * and the page copied, before the data is there.
 */
class DirtyLog {
 public:
  /** In someone else's memory: the map is what lies in `places`, one behind the other; it is as large as it must be. */
  DirtyLog(LogMap map, const LogRange& range, const std::vector<iovec>& places);
  /** In its own, all clear. nullptr where there is no memory. */
  static std::shared_ptr<DirtyLog> own(LogMap map, const LogRange& range);
  ~DirtyLog();
  DirtyLog(const DirtyLog&) = delete;
  DirtyLog& operator=(const DirtyLog&) = delete;

  /** Notes a write that will be done before the next `flush`; what is outside the range is none. Inside turns. */
  void wrote(uint64_t address, uint64_t length) {
    const uint64_t begin = std::max(address, range_.address);
    const uint64_t past = length > UINT64_MAX - address ? UINT64_MAX : address + length;
    const uint64_t end = std::min(past, range_.address + range_.length);
    if (begin >= end) return;
    const Run run = {(begin - range_.address) >> pageShift_, (end - 1 - range_.address) >> pageShift_};
    if (!noted_.empty() && run.first >= noted_.back().first && run.first <= noted_.back().last + 1) {
      noted_.back().last = std::max(noted_.back().last, run.last);
    } else {
      noted_.push_back(run);
    }
  }
  /** Marks what was noted. False where the map's memory is gone. Inside turns. */
  bool flush();

  /**
   * Nothing is marked any more when it returns. The first reason is kept. Never waits for more than some marks, by any
   * thread.
   */
  void cut(const std::string& reason);
  /** The same where a part of the map lies in that memory. */
  void cutWithin(const uint8_t* host, uint64_t size, const std::string& reason);
  /** Why not all is marked any more; empty where all is. By any thread. */
  std::string lost() const;

  uint64_t bytes() const { return range_.mapBytes(map_); }
  /** Reads and clears a part of the map, which lies in it. Of a log with memory of its own. */
  void take(uint64_t offset, uint64_t length, uint8_t* to);

 private:
  /** Pages, both inclusive. */
  struct Run {
    uint64_t first;
    uint64_t last;
  };
  /** Bytes of the map from `start` on. */
  struct Place {
    uint64_t start;
    uint64_t length;
    uint8_t* host;
  };

  void mark(const Run& run) const;

  const LogMap map_;
  const LogRange range_;
  const unsigned pageShift_;
  std::vector<Place> places_;
  bool owned_ = false;
  std::vector<Run> noted_;
  /** While it is held `places_` may be touched, unless it is lost; held for no longer than marking takes. */
  mutable std::mutex mutex_;
  std::string lost_;
};

}  // namespace vhostd::ring
