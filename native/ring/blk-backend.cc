#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "backend.h"
#include "deferral.h"
#include "file.h"

namespace vhostd::ring {
namespace {

constexpr uint64_t kSector = 512;
/** Bytes moved between two looks at the gate. */
constexpr uint64_t kPiece = 1 << 20;

/** VIRTIO 1.2, 5.2.6. */
enum Type : uint32_t { kIn = 0, kOut = 1, kFlush = 4, kGetId = 8, kDiscard = 11, kWriteZeroes = 13 };
enum Status : uint8_t { kOk = 0, kIoError = 1, kUnsupported = 2 };
constexpr uint32_t kUnmap = 1;
constexpr size_t kIdBytes = 20;
constexpr int kFeatureFlush = 9;
constexpr int kFeatureConfigWce = 11;

struct Header {
  uint32_t type;
  uint32_t reserved;
  uint64_t sector;
};
static_assert(sizeof(Header) == 16);

/** struct virtio_blk_discard_write_zeroes. */
struct Range {
  uint64_t sector;
  uint32_t sectors;
  uint32_t flags;
};
static_assert(sizeof(Range) == 16);

/** What became of a request. */
struct Result {
  Status status;
  /** Bytes at the start of the writable buffers. */
  uint64_t written = 0;
  /** Bytes of data moved. */
  uint64_t moved = 0;
  bool abandoned = false;
};

/** One buffer is the usual case, and cheaper without a list of it. */
ssize_t readFile(int fd, const std::vector<iovec>& parts, off_t offset) {
  if (parts.size() == 1) return pread(fd, parts[0].iov_base, parts[0].iov_len, offset);
  return preadv(fd, parts.data(), static_cast<int>(parts.size()), offset);
}

ssize_t writeFile(int fd, const std::vector<iovec>& parts, off_t offset) {
  if (parts.size() == 1) return pwrite(fd, parts[0].iov_base, parts[0].iov_len, offset);
  return pwritev(fd, parts.data(), static_cast<int>(parts.size()), offset);
}

/** A block device over a regular file. */
class BlkBackend final : public RingBackend {
 public:
  std::string set(const std::string& name, const Parameter& value) override;
  std::string missing() const override { return file_.valid() ? "" : "fd"; }
  void start(uint64_t features) override;
  void serve(Chain* chain, ServiceContext& context) override;
  int64_t due() const override { return deferral_.due(); }
  void resume(int64_t now, ServiceContext& context) override;
  void drain(ServiceContext& context) override { resume(INT64_MAX, context); }
  void drop() override { deferral_.drop(); }

 private:
  void execute(Chain* chain, ServiceContext& context);
  Result perform(const Chain& chain, ServiceContext& context);
  Result transfer(const Chain& chain, bool write, uint64_t sector, ServiceContext& context);
  Result getId(const Chain& chain, ServiceContext& context);
  Result ranges(const Chain& chain, bool discard, ServiceContext& context);
  bool clear(uint64_t offset, uint64_t length, bool discard, bool unmap, ServiceContext& context);
  Result settled(Result result, ServiceContext& context);
  Status flush(ServiceContext& context);
  bool fits(uint64_t sector, uint64_t bytes) const;

  File file_;
  uint64_t capacity_ = 0;
  uint64_t mostSectors_ = 0;
  uint64_t mostRanges_ = 0;
  bool readOnly_ = false;
  bool writeback_ = true;
  bool outOfOrder_ = false;
  int64_t delay_ = 0;
  std::string serial_;
  uint64_t features_ = 0;
  Deferral deferral_;
};

std::string BlkBackend::set(const std::string& name, const Parameter& value) {
  const auto* number = std::get_if<int64_t>(&value);
  const auto* flag = std::get_if<bool>(&value);
  const auto* text = std::get_if<std::string>(&value);
  if (number != nullptr && *number >= 0) {
    if (name == "fd") {
      File file = File::duplicate(static_cast<int>(*number));
      if (!file.valid()) return "fd " + std::to_string(*number) + " cannot be duplicated";
      file_ = std::move(file);
    } else if (name == "capacity") {
      capacity_ = static_cast<uint64_t>(*number) / kSector * kSector;
    } else if (name == "cut") {
      capacity_ = static_cast<uint64_t>(*number) / kSector * kSector;
      if (ftruncate(file_.number(), *number) != 0) return std::string("the image was not cut: ") + strerror(errno);
    } else if (name == "maxRangeSectors") {
      mostSectors_ = static_cast<uint64_t>(*number);
    } else if (name == "maxRanges") {
      mostRanges_ = static_cast<uint64_t>(*number);
    } else if (name == "slow") {
      delay_ = *number * 1'000'000;
      deferral_.hasten(monotonicNow() + delay_);
    } else {
      return "no number";
    }
    return {};
  }
  if (flag != nullptr) {
    if (name == "readOnly") {
      readOnly_ = *flag;
    } else if (name == "writeback") {
      writeback_ = *flag;
    } else if (name == "outOfOrder") {
      outOfOrder_ = *flag;
    } else {
      return "no boolean";
    }
    return {};
  }
  if (text != nullptr && name == "serial") {
    serial_ = *text;
    return {};
  }
  return "no such parameter";
}

void BlkBackend::start(uint64_t features) {
  features_ = features;
}

void BlkBackend::serve(Chain* chain, ServiceContext& context) {
  if (chain->writableSize == 0) {
    context.fail("request " + std::to_string(chain->head) + " of queue " + std::to_string(chain->queue) +
                 " has no place for the status byte");
    return;
  }
  if (delay_ > 0) {
    // Out of order, younger requests overtake older ones while these are still under way.
    deferral_.put(chain, monotonicNow() + delay_ + (outOfOrder_ ? deferral_.sometime(delay_) : 0));
  } else if (outOfOrder_) {
    deferral_.put(chain, 0);
  } else {
    execute(chain, context);
  }
}

void BlkBackend::resume(int64_t now, ServiceContext& context) {
  while (Chain* chain = deferral_.take(now, outOfOrder_)) {
    execute(chain, context);
    if (!context.giveWay()) return;
  }
}

void BlkBackend::execute(Chain* chain, ServiceContext& context) {
  const Result result = perform(*chain, context);
  if (result.abandoned) {
    context.abandon(chain);
    return;
  }
  const uint64_t statusAt = chain->writableSize - 1;
  if (!context.copyTo(*chain, statusAt, &result.status, 1)) {
    context.fail("status byte of request " + std::to_string(chain->head) + " of queue " +
                 std::to_string(chain->queue) + " is not in mapped memory");
    return;
  }
  // The length covers what was written without a gap from the start (VIRTIO 1.2, 2.7.8.2).
  const uint64_t written = result.written == statusAt ? statusAt + 1 : result.written;
  context.complete(chain, static_cast<uint32_t>(std::min<uint64_t>(written, UINT32_MAX)), result.moved,
                   result.status == kIoError);
}

Result BlkBackend::perform(const Chain& chain, ServiceContext& context) {
  Header header;
  if (chain.misordered || chain.readableSize < sizeof header || !context.copyFrom(chain, 0, &header, sizeof header)) {
    return {kIoError};
  }
  switch (header.type) {
    case kIn:
      return transfer(chain, false, header.sector, context);
    case kOut:
      return readOnly_ ? Result{kIoError} : settled(transfer(chain, true, header.sector, context), context);
    case kFlush:
      return {flush(context)};
    case kGetId:
      return getId(chain, context);
    case kDiscard:
      return readOnly_ ? Result{kIoError} : settled(ranges(chain, true, context), context);
    case kWriteZeroes:
      return readOnly_ ? Result{kIoError} : settled(ranges(chain, false, context), context);
    default:
      return {kUnsupported};
  }
}

bool BlkBackend::fits(uint64_t sector, uint64_t bytes) const {
  return bytes % kSector == 0 && sector <= capacity_ / kSector && bytes <= capacity_ - sector * kSector;
}

Result BlkBackend::transfer(const Chain& chain, bool write, uint64_t sector, ServiceContext& context) {
  const Direction direction = write ? Direction::readable : Direction::writable;
  const uint64_t head = write ? sizeof(Header) : 0;
  const uint64_t total = write ? chain.readableSize - head : chain.writableSize - 1;
  if (!fits(sector, total)) return {kIoError};
  Result result{kOk};
  while (result.moved < total) {
    const uint64_t piece = std::min(kPiece, total - result.moved);
    const std::vector<iovec>* parts = context.vectors(chain, direction, head + result.moved, piece);
    if (parts == nullptr) {
      result.status = kIoError;
      break;
    }
    const off_t offset = static_cast<off_t>(sector * kSector + result.moved);
    // The kernel answers EFAULT where the memory behind a buffer is gone.
    const ssize_t done = write ? writeFile(file_.number(), *parts, offset) : readFile(file_.number(), *parts, offset);
    if (done < 0 && errno == EINTR) {
      if (!context.giveWay()) return {kIoError, 0, 0, true};
      continue;
    }
    if (done <= 0) {
      result.status = kIoError;
      break;
    }
    result.moved += static_cast<uint64_t>(done);
    if (result.moved < total && !context.giveWay()) return {kIoError, 0, 0, true};
  }
  if (!write) result.written = result.moved;
  return result;
}

Result BlkBackend::getId(const Chain& chain, ServiceContext& context) {
  char id[kIdBytes] = {};
  memcpy(id, serial_.data(), std::min(serial_.size(), sizeof id));
  const uint64_t length = std::min<uint64_t>(sizeof id, chain.writableSize - 1);
  if (!context.copyTo(chain, 0, id, length)) return {kIoError};
  return {kOk, length};
}

Result BlkBackend::ranges(const Chain& chain, bool discard, ServiceContext& context) {
  const uint64_t bytes = chain.readableSize - sizeof(Header);
  if (bytes == 0 || bytes % sizeof(Range) != 0 || bytes / sizeof(Range) > mostRanges_) return {kIoError};
  Result result{kOk};
  for (uint64_t at = 0; at < bytes; at += sizeof(Range)) {
    Range range;
    if (!context.copyFrom(chain, sizeof(Header) + at, &range, sizeof range)) return {kIoError};
    const bool unmap = (range.flags & kUnmap) != 0;
    if ((range.flags & ~kUnmap) != 0 || (discard && unmap)) return {kUnsupported};
    const uint64_t length = range.sectors * kSector;
    if (range.sectors > mostSectors_ || !fits(range.sector, length)) return {kIoError};
    if (length == 0) continue;
    if (!clear(range.sector * kSector, length, discard, unmap, context)) return {kIoError};
    result.moved += length;
  }
  return result;
}

/** Discarding is a hint: where the file system cannot, nothing is done. Zeroes are zeroes everywhere. */
bool BlkBackend::clear(uint64_t offset, uint64_t length, bool discard, bool unmap, ServiceContext& context) {
  bool done = false;
  context.blocking([&] {
    const int mode = FALLOC_FL_KEEP_SIZE | (discard || unmap ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE);
    int answer;
    do {
      answer = fallocate(file_.number(), mode, static_cast<off_t>(offset), static_cast<off_t>(length));
    } while (answer != 0 && errno == EINTR);
    done = answer == 0;
    if (done || errno != EOPNOTSUPP) return;
    if (discard) {
      done = true;
      return;
    }
    static const uint8_t zeroes[65536] = {};
    for (uint64_t at = 0; at < length;) {
      const uint64_t piece = std::min<uint64_t>(sizeof zeroes, length - at);
      const ssize_t wrote = pwrite(file_.number(), zeroes, piece, static_cast<off_t>(offset + at));
      if (wrote < 0 && errno == EINTR) continue;
      if (wrote <= 0) return;
      at += static_cast<uint64_t>(wrote);
    }
    done = true;
  });
  return done;
}

/** Without a write cache a change is on the medium before its request completes (VIRTIO 1.2, 5.2.6.2). */
Result BlkBackend::settled(Result result, ServiceContext& context) {
  const bool canFlush = (features_ >> kFeatureFlush & 1) != 0;
  const bool canSwitch = (features_ >> kFeatureConfigWce & 1) != 0;
  const bool cached = canSwitch ? writeback_ : canFlush;
  if (result.status == kOk && !result.abandoned && !cached) result.status = flush(context);
  return result;
}

Status BlkBackend::flush(ServiceContext& context) {
  bool done = false;
  context.blocking([&] {
    int answer;
    do {
      answer = fdatasync(file_.number());
    } while (answer != 0 && errno == EINTR);
    done = answer == 0;
  });
  return done ? kOk : kIoError;
}

}  // namespace

std::unique_ptr<RingBackend> createBlkBackend() {
  return std::make_unique<BlkBackend>();
}

}  // namespace vhostd::ring
