/**
 * The driver side of one split virtqueue (VIRTIO 1.2, 2.7) of a block device that a front-end has set up: random reads
 * of 4 KiB, so many at a time, closed loop. Each block of the disk begins with its own number, which is compared.
 *
 *   blk-load DEPTH SECONDS BLOCKS RING-SIZE GPA DESC DRIVER DEVICE BUFFERS
 *
 * Addresses are guest-physical; GPA is where the memory begins. Descriptors: 3 memory file, 4 kick, 5 call. Indices go
 * on where they are. RING_INDIRECT_DESC and RING_EVENT_IDX are negotiated. Prints requests per second, and the longest time
 * without a completion, microseconds.
 */
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "load.h"

namespace {

using namespace load;

constexpr int kKick = 4;
constexpr int kCall = 5;
constexpr uint32_t kBlock = 4096;
constexpr uint32_t kSector = 512;
constexpr uint16_t kNext = 1;
constexpr uint16_t kIndirect = 4;

/** What a request needs beside its descriptor, in guest memory. */
struct Request {
  uint8_t data[kBlock];
  struct {
    uint32_t type;
    uint32_t reserved;
    uint64_t sector;
  } header;
  Descriptor table[3];
  uint8_t status;
  uint8_t padding[kBlock - 16 - 48 - 1];
};
static_assert(sizeof(Request) == 2 * kBlock, "requests are aligned to blocks");

void fullFence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

struct Result {
  /** Requests per second. */
  double rate;
  /** Seconds. */
  double longestGap;
};

class Load {
 public:
  explicit Load(char** arguments) : memory_(number(arguments[5])) {
    depth_ = number(arguments[1]);
    blocks_ = number(arguments[3]);
    size_ = static_cast<uint16_t>(number(arguments[4]));
    descriptors_ = memory_.at<Descriptor>(number(arguments[6]));
    available_ = memory_.at<uint16_t>(number(arguments[7]));
    used_ = memory_.at<uint16_t>(number(arguments[8]));
    requests_ = memory_.at<Request>(number(arguments[9]));
    // A thread that waits for nothing else reads until there is something.
    if (fcntl(kCall, F_SETFL, fcntl(kCall, F_GETFL) & ~O_NONBLOCK) != 0) fail("call");
    next_ = available_[1];
    seen_ = usedIndex();
    if (next_ != seen_) fail("requests are under way already");
    for (uint32_t slot = 0; slot < depth_; slot++) free_.push_back(slot);
  }

  /** All requests are back when it returns. */
  Result run(double seconds) {
    const double begin = now();
    double last = begin;
    double longestGap = 0;
    uint64_t completed = 0;
    for (double time = begin; time - begin < seconds; time = now()) {
      longestGap = std::max(longestGap, time - last);
      last = time;
      submitAll();
      completed += waitForSome();
    }
    const double elapsed = now() - begin;
    while (free_.size() < depth_) waitForSome();
    return {static_cast<double>(completed) / elapsed, longestGap};
  }

 private:
  uint16_t usedIndex() const { return __atomic_load_n(&used_[1], __ATOMIC_ACQUIRE); }

  void submitAll() {
    const uint16_t before = next_;
    for (const uint32_t slot : free_) submit(slot);
    free_.clear();
    __atomic_store_n(&available_[1], next_, __ATOMIC_RELEASE);
    fullFence();
    const uint16_t event = __atomic_load_n(&used_[2 + 4 * size_], __ATOMIC_RELAXED);
    // 2.7.10: did the index pass the one that the device waits for?
    if (static_cast<uint16_t>(next_ - event - 1) >= static_cast<uint16_t>(next_ - before)) return;
    kick(kKick);
  }

  void submit(uint32_t slot) {
    Request& request = requests_[slot];
    const uint64_t block = random() % blocks_;
    request.header = {0, 0, block * (kBlock / kSector)};
    *reinterpret_cast<uint64_t*>(request.data) = ~block;
    request.status = 0xff;
    request.table[0] = {memory_.addressOf(&request.header), sizeof request.header, kNext, 1};
    request.table[1] = {memory_.addressOf(request.data), kBlock, kNext | kWrite, 2};
    request.table[2] = {memory_.addressOf(&request.status), 1, kWrite, 0};
    descriptors_[slot] = {memory_.addressOf(request.table), sizeof request.table, kIndirect, 0};
    available_[2 + next_ % size_] = static_cast<uint16_t>(slot);
    next_++;
  }

  /** At least one. */
  uint32_t waitForSome() {
    for (;;) {
      const uint32_t count = takeCompleted();
      if (count > 0) return count;
      // used_event: a call for the next one.
      __atomic_store_n(&available_[2 + size_], seen_, __ATOMIC_RELAXED);
      fullFence();
      if (usedIndex() != seen_) continue;
      uint64_t calls;
      if (read(kCall, &calls, sizeof calls) != sizeof calls) fail("call");
    }
  }

  uint32_t takeCompleted() {
    const auto* elements = reinterpret_cast<const UsedElement*>(used_ + 2);
    uint32_t count = 0;
    for (const uint16_t index = usedIndex(); seen_ != index; seen_++, count++) {
      const uint32_t slot = elements[seen_ % size_].id;
      if (slot >= depth_) fail("the device gave back what it was not given");
      const Request& request = requests_[slot];
      const uint64_t block = request.header.sector / (kBlock / kSector);
      if (request.status != 0) fail("a read failed");
      if (*reinterpret_cast<const uint64_t*>(request.data) != block) fail("a block is not what was written");
      free_.push_back(slot);
    }
    return count;
  }

  uint64_t random() {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return random_;
  }

  const GuestMemory memory_;
  uint64_t depth_ = 0;
  uint64_t blocks_ = 0;
  uint16_t size_ = 0;
  Descriptor* descriptors_ = nullptr;
  uint16_t* available_ = nullptr;
  uint16_t* used_ = nullptr;
  Request* requests_ = nullptr;
  std::vector<uint32_t> free_;
  /** Next index to make available, and to see used. */
  uint16_t next_ = 0;
  uint16_t seen_ = 0;
  uint64_t random_ = 88172645463325252;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 10) return 2;
  Load load(argv);
  load.run(kWarmUpSeconds);
  const Result result = load.run(atof(argv[2]));
  printf("%.0f %.1f\n", result.rate, result.longestGap * 1e6);
  return 0;
}
