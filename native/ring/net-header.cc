#include "net-header.h"

namespace vhostd::ring {
namespace {

enum Flag : uint8_t { kNeedsChecksum = 1, kDataValid = 2 };
enum GsoType : uint8_t { kGsoNone = 0, kTcp4 = 1, kUdp = 3, kTcp6 = 4, kUdpL4 = 5, kEcn = 0x80 };

bool hasChecksumField(const NetHeader& header, size_t length) {
  return size_t{header.checksumStart} + header.checksumOffset + 2 <= length;
}

/** The two feature bits that each type of segmentation needs one of: what the driver may send, what it takes. */
bool segments(uint8_t type, uint64_t features, bool sent) {
  using namespace net_feature;
  if ((type & kEcn) != 0 && !hasFeature(features, sent ? hostEcn : guestEcn)) return false;
  switch (type & ~kEcn) {
    case kTcp4:
      return hasFeature(features, sent ? hostTso4 : guestTso4);
    case kTcp6:
      return hasFeature(features, sent ? hostTso6 : guestTso6);
    case kUdp:
      return hasFeature(features, sent ? hostUfo : guestUfo);
    case kUdpL4:
      return sent ? hasFeature(features, hostUso)
                  : hasFeature(features, guestUso4) && hasFeature(features, guestUso6);
    default:
      return false;
  }
}

/** The Internet checksum from `start` on, whose field holds that of the pseudo header (5.1.6.2). */
void completeChecksum(const NetHeader& header, uint8_t* frame, size_t length) {
  uint64_t sum = 0;
  size_t at = header.checksumStart;
  for (; at + 1 < length; at += 2) sum += static_cast<uint64_t>(frame[at]) << 8 | frame[at + 1];
  if (at < length) sum += static_cast<uint64_t>(frame[at]) << 8;
  while (sum >> 16 != 0) sum = (sum & 0xffff) + (sum >> 16);
  uint16_t checksum = static_cast<uint16_t>(~sum);
  // To UDP 0 means that there is none; to TCP both are the same.
  if (checksum == 0) checksum = 0xffff;
  uint8_t* field = frame + header.checksumStart + header.checksumOffset;
  field[0] = static_cast<uint8_t>(checksum >> 8);
  field[1] = static_cast<uint8_t>(checksum);
}

}  // namespace

bool maySend(const NetHeader& header, size_t length, uint64_t features) {
  const bool partial = (header.flags & kNeedsChecksum) != 0;
  if (partial && (!hasFeature(features, net_feature::csum) || !hasChecksumField(header, length))) return false;
  if (header.gsoType == kGsoNone) return true;
  return partial && header.gsoSize != 0 && header.headerLength <= length && segments(header.gsoType, features, true);
}

bool prepareForDriver(NetHeader& header, uint8_t* frame, size_t length, uint64_t features) {
  if (header.gsoType != kGsoNone && !segments(header.gsoType, features, false)) return false;
  if (hasFeature(features, net_feature::guestCsum)) {
    header.flags &= kNeedsChecksum | kDataValid;
    return true;
  }
  if ((header.flags & kNeedsChecksum) != 0) {
    if (header.gsoType != kGsoNone || !hasChecksumField(header, length)) return false;
    completeChecksum(header, frame, length);
  }
  header.flags = 0;
  return true;
}

}  // namespace vhostd::ring
