/**
 * The driver side of one network device (VIRTIO 1.2, 5.1) behind which frames come back: all of them are sent again as
 * they arrive, so that so many are always under way.
 *
 *   net-load FRAMES SIZE SECONDS RING-SIZE GPA RX-DESC RX-DRIVER RX-DEVICE TX-DESC TX-DRIVER TX-DEVICE BUFFERS
 *
 * Addresses are guest-physical; GPA is where the memory begins. SIZE is that of a frame with its header of 12 bytes.
 * Descriptors: 3 memory file, 4 kick of the receive queue, 5 of the transmit queue. Indices go on where they are. It polls
 * and wants no calls. Neither RING_INDIRECT_DESC nor RING_EVENT_IDX is negotiated. Prints frames received per second.
 */
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "load.h"

namespace {

using namespace load;

constexpr double kPatienceSeconds = 5;
constexpr uint32_t kBuffer = 2048;
constexpr uint32_t kHeader = 12;
constexpr uint32_t kAddresses = 12;
constexpr uint16_t kNoInterrupt = 1;
constexpr uint16_t kNoNotify = 1;

/** A split virtqueue whose buffer n is always that of descriptor n. */
struct Queue {
  Descriptor* descriptors;
  uint16_t* available;
  uint16_t* used;
  uint8_t* buffers;
  uint64_t buffersAddress;
  uint16_t size;
  int kickFd;
  uint16_t next = 0;
  uint16_t published = 0;
  uint16_t seen = 0;

  uint8_t* buffer(uint16_t id) const { return buffers + static_cast<size_t>(id) * kBuffer; }

  void begin() {
    next = published = available[1];
    seen = usedIndex();
    available[0] = kNoInterrupt;
  }

  uint16_t inUse() const { return static_cast<uint16_t>(next - seen); }

  uint16_t usedIndex() const { return __atomic_load_n(&used[1], __ATOMIC_ACQUIRE); }

  void push(uint16_t id, uint32_t length, uint16_t flags) {
    descriptors[id] = {buffersAddress + static_cast<uint64_t>(id) * kBuffer, length, flags, 0};
    available[2 + next % size] = id;
    next++;
  }

  void publish() {
    if (published == next) return;
    published = next;
    __atomic_store_n(&available[1], next, __ATOMIC_RELEASE);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if ((__atomic_load_n(&used[0], __ATOMIC_RELAXED) & kNoNotify) != 0) return;
    kick(kickFd);
  }

  const UsedElement& take() { return reinterpret_cast<const UsedElement*>(used + 2)[seen++ % size]; }
};

class Load {
 public:
  explicit Load(char** arguments)
      : frames_(number(arguments[1])), length_(number(arguments[2])), memory_(number(arguments[5])) {
    const uint16_t size = static_cast<uint16_t>(number(arguments[4]));
    const uint64_t buffers = number(arguments[12]);
    receive_ = makeQueue(arguments + 6, size, 4, buffers);
    transmit_ = makeQueue(arguments + 9, size, 5, buffers + static_cast<uint64_t>(size) * kBuffer);
    if (frames_ > size || length_ > kBuffer || length_ < kHeader + kAddresses) fail("too many or too long");
  }

  /** Frames received per second; all are back when it returns. */
  double run(double seconds) {
    if (!begun_) begin();
    for (uint16_t id = 0; id < frames_; id++) sendFrame(id);
    transmit_.publish();
    const double begin = now();
    uint64_t received = 0;
    double last = begin;
    for (double time = begin; time - begin < seconds; time = now()) {
      const uint32_t count = turn(true);
      received += count;
      if (count > 0) last = time;
      if (time - last > kPatienceSeconds) break;
    }
    const double elapsed = now() - begin;
    uint64_t back = 0;
    for (double from = now(); transmit_.seen != transmit_.next || sent_ != received + back;) {
      const uint32_t count = turn(false);
      back += count;
      if (count > 0) from = now();
      // A frame that was lost does not come back.
      if (now() - from > 0.2) break;
    }
    sent_ = 0;
    return static_cast<double>(received) / elapsed;
  }

 private:
  Queue makeQueue(char** places, uint16_t size, int kickFd, uint64_t buffers) const {
    Queue queue{};
    queue.descriptors = memory_.at<Descriptor>(number(places[0]));
    queue.available = memory_.at<uint16_t>(number(places[1]));
    queue.used = memory_.at<uint16_t>(number(places[2]));
    queue.buffers = memory_.at<uint8_t>(buffers);
    queue.buffersAddress = buffers;
    queue.size = size;
    queue.kickFd = kickFd;
    return queue;
  }

  void begin() {
    begun_ = true;
    receive_.begin();
    transmit_.begin();
    if (transmit_.inUse() != 0) fail("frames are under way already");
    // An earlier run has left them there.
    if (receive_.inUse() == receive_.size) return;
    if (receive_.inUse() != 0) fail("buffers are in use already");
    for (uint16_t id = 0; id < receive_.size; id++) receive_.push(id, kBuffer, kWrite);
    receive_.publish();
  }

  void sendFrame(uint16_t id) {
    uint8_t* frame = transmit_.buffer(id);
    memset(frame, 0, kHeader);
    memset(frame + kHeader, 0xff, kAddresses);
    transmit_.push(id, length_, 0);
    sent_++;
  }

  /** @param again what comes back is sent anew. @returns frames received */
  uint32_t turn(bool again) {
    uint32_t received = 0;
    for (const uint16_t index = receive_.usedIndex(); receive_.seen != index; received++) {
      const UsedElement element = receive_.take();
      if (element.id >= receive_.size || element.length != length_) fail("a frame is not what was sent");
      receive_.push(static_cast<uint16_t>(element.id), kBuffer, kWrite);
    }
    credit_ += received;
    for (const uint16_t index = transmit_.usedIndex(); transmit_.seen != index;) {
      free_[freeCount_++] = static_cast<uint16_t>(transmit_.take().id);
    }
    if (!again) credit_ = 0;
    for (; credit_ > 0 && freeCount_ > 0; credit_--) sendFrame(free_[--freeCount_]);
    receive_.publish();
    transmit_.publish();
    if (!again) freeCount_ = 0;
    if (received == 0) sched_yield();
    return received;
  }

  const uint64_t frames_;
  const uint32_t length_;
  const GuestMemory memory_;
  Queue receive_{};
  Queue transmit_{};
  bool begun_ = false;
  uint64_t sent_ = 0;
  /** Frames that came back and were not sent again yet. */
  uint64_t credit_ = 0;
  uint16_t free_[32768];
  uint32_t freeCount_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 13) return 2;
  static Load load(argv);
  load.run(kWarmUpSeconds);
  printf("%.0f\n", load.run(atof(argv[3])));
  return 0;
}
