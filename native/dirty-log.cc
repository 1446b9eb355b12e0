#include <errno.h>

#include "guard.h"
#include "symbols.h"

// A log is shared with its front-end, which reads and clears it, and may make its file shorter, at any time.

namespace {

constexpr int64_t BITS = 8;
constexpr uint64_t WORD_BYTES = sizeof(uint64_t);

void mark(uint8_t* log, int64_t page) {
  const uint8_t bit = static_cast<uint8_t>(1u << (page % BITS));
  uint8_t* byte = log + page / BITS;
  // A page that is marked already need not take the cache line from who reads it.
  if ((__atomic_load_n(byte, __ATOMIC_ACQUIRE) & bit) == 0) __atomic_fetch_or(byte, bit, __ATOMIC_RELEASE);
}

bool isAligned(const uint8_t* at) { return reinterpret_cast<uintptr_t>(at) % WORD_BYTES == 0; }

}  // namespace

int32_t vhostd_log_mark(int64_t log, int64_t first, int64_t count) {
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(log);
  const bool done = vhostd::guarded([=] {
    int64_t page = first;
    const int64_t end = first + count;
    for (; page < end && page % BITS != 0; page++) mark(bytes, page);
    // All bits of a byte: to set them is to store it.
    for (; page + BITS <= end; page += BITS) __atomic_store_n(bytes + page / BITS, 0xff, __ATOMIC_RELEASE);
    for (; page < end; page++) mark(bytes, page);
  });
  return done ? 0 : -EFAULT;
}

int32_t vhostd_log_merge_bitmap(int64_t log, const uint8_t* from, int64_t length) {
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(log);
  const bool done = vhostd::guarded([=] {
    for (int64_t at = 0; at < length; at++) {
      if (from[at] != 0) __atomic_fetch_or(bytes + at, from[at], __ATOMIC_RELEASE);
    }
  });
  return done ? 0 : -EFAULT;
}

int32_t vhostd_log_merge_bytemap(int64_t log, int64_t first, const uint8_t* from, int64_t count) {
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(log);
  const bool done = vhostd::guarded([=] {
    for (int64_t at = 0; at < count; at++) {
      if (from[at] != 0) mark(bytes, first + at);
    }
  });
  return done ? 0 : -EFAULT;
}

int32_t vhostd_log_take_bytemap(int64_t log, int64_t first, int64_t map, int64_t count) {
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(log);
  uint8_t* const marks = reinterpret_cast<uint8_t*>(map);
  const bool done = vhostd::guarded([=] {
    for (int64_t at = 0; at < count;) {
      const bool word = isAligned(marks + at) && at + static_cast<int64_t>(WORD_BYTES) <= count;
      if (word && __atomic_load_n(reinterpret_cast<uint64_t*>(marks + at), __ATOMIC_ACQUIRE) == 0) {
        at += WORD_BYTES;
        continue;
      }
      // What is written after the exchange is found by the next one.
      if (__atomic_load_n(marks + at, __ATOMIC_RELAXED) != 0 && __atomic_exchange_n(marks + at, 0, __ATOMIC_ACQ_REL) != 0) {
        mark(bytes, first + at);
      }
      at++;
    }
  });
  return done ? 0 : -EFAULT;
}

int64_t vhostd_log_count(int64_t log, int64_t length) {
  const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(log);
  int64_t marked = 0;
  int64_t* const result = &marked;
  const bool done = vhostd::guarded([=] {
    int64_t sum = 0;
    int64_t at = 0;
    for (; at < length && !isAligned(bytes + at); at++) sum += __builtin_popcount(__atomic_load_n(bytes + at, __ATOMIC_RELAXED));
    for (; at + static_cast<int64_t>(WORD_BYTES) <= length; at += WORD_BYTES) {
      sum += __builtin_popcountll(__atomic_load_n(reinterpret_cast<const uint64_t*>(bytes + at), __ATOMIC_RELAXED));
    }
    for (; at < length; at++) sum += __builtin_popcount(__atomic_load_n(bytes + at, __ATOMIC_RELAXED));
    *result = sum;
  });
  return done ? marked : -EFAULT;
}
