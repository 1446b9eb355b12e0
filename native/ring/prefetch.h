#pragma once

#include <cstddef>
#include <cstdint>

/** Memory that is about to be used is fetched while there is other work. None of it can fault. */
namespace vhostd::ring {

inline constexpr size_t kCacheLine = 64;

inline void prefetchForReading(const uint8_t* at, size_t bytes) {
  for (size_t offset = 0; offset < bytes; offset += kCacheLine) __builtin_prefetch(at + offset);
}

/** Takes the lines from the other processor's cache at once, not when they are written to. */
inline void prefetchForWriting(const uint8_t* at, size_t bytes) {
  for (size_t offset = 0; offset < bytes; offset += kCacheLine) {
#ifdef __x86_64__
    // The builtin would fetch them to be read, as not every x86-64 has this; on one that has not it does nothing.
    asm volatile("prefetchw %0" ::"m"(at[offset]));
#else
    __builtin_prefetch(at + offset, 1);
#endif
  }
}

}  // namespace vhostd::ring
