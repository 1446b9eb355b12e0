#pragma once

#include <cstdint>
#include <vector>

namespace vhostd::ring {

/** One buffer of a chain, in guest addresses: what it means in this process is asked for when it is touched. */
struct Segment {
  uint64_t iova;
  uint32_t length;
};

enum class Direction { readable, writable };

/** A descriptor chain that the device has taken and not yet given back. Empty buffers are left out. */
struct Chain {
  uint16_t queue = 0;
  uint16_t head = 0;
  /** A device-readable buffer followed a device-writable one: the request is malformed (VIRTIO 1.2, 2.7.4.2). */
  bool misordered = false;
  std::vector<Segment> readable;
  std::vector<Segment> writable;
  /** Bytes. */
  uint64_t readableSize = 0;
  uint64_t writableSize = 0;
  /** Was in flight when its ring was activated. */
  bool again = false;
  /** When a backend that delays it wants to serve it: CLOCK_MONOTONIC, ns. */
  int64_t due = 0;

  void clear() {
    misordered = false;
    readable.clear();
    writable.clear();
    readableSize = writableSize = 0;
    due = 0;
  }
};

}  // namespace vhostd::ring
