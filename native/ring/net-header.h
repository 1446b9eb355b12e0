#pragma once

#include <cstddef>
#include <cstdint>

namespace vhostd::ring {

/** struct virtio_net_hdr_v1 (VIRTIO 1.2, 5.1.6), little-endian as this machine is. Nothing in it is trusted. */
struct NetHeader {
  uint8_t flags;
  uint8_t gsoType;
  uint16_t headerLength;
  uint16_t gsoSize;
  uint16_t checksumStart;
  uint16_t checksumOffset;
  uint16_t buffers;
};
static_assert(sizeof(NetHeader) == 12);

/** VIRTIO 1.2, 5.1.3. */
namespace net_feature {
inline constexpr int csum = 0, guestCsum = 1, mtu = 3, guestTso4 = 7, guestTso6 = 8, guestEcn = 9, guestUfo = 10;
inline constexpr int hostTso4 = 11, hostTso6 = 12, hostEcn = 13, hostUfo = 14, mrgRxbuf = 15, ctrlRx = 18, mq = 22;
inline constexpr int guestUso4 = 54, guestUso6 = 55, hostUso = 56;
}  // namespace net_feature

inline bool hasFeature(uint64_t features, int bit) { return (features >> bit & 1) != 0; }

/** Of an Ethernet frame without its checksum, bytes. */
inline constexpr size_t kLeastFrame = 14;
/** The largest datagram, its Ethernet header and two VLAN tags. */
inline constexpr size_t kMostFrame = 65535 + 14 + 8;
inline constexpr size_t kMacBytes = 6;

/** Whether a driver that negotiated `features` may send a frame of `length` bytes with this header (5.1.6.2.1). */
bool maySend(const NetHeader& header, size_t length, uint64_t features);
/**
 * Makes a frame one that a driver that negotiated `features` understands: completes its checksum, takes out what says
 * nothing to it (5.1.6.4.1). False where it cannot be, a frame to be segmented.
 */
bool prepareForDriver(NetHeader& header, uint8_t* frame, size_t length, uint64_t features);

}  // namespace vhostd::ring
