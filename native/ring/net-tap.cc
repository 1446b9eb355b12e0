#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <set>

#include "../retry.h"
#include "file.h"
#include "net-port.h"

// Of Linux 6.2.
#ifndef TUN_F_USO4
#define TUN_F_USO4 0x20
#define TUN_F_USO6 0x40
#endif

namespace vhostd::ring {
namespace {

constexpr short kFlags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
constexpr size_t kBuffer = sizeof(NetHeader) + kMostFrame;
/** Of a queue at a start: more than interfaces usually hold, and an end where more keep coming. */
constexpr int kMostDiscarded = 1 << 14;

/** The interfaces that ports of this process use: a second port would only take a share of the first one's frames. */
class Names {
 public:
  bool take(const std::string& name) {
    std::lock_guard lock(mutex_);
    return names_.insert(name).second;
  }
  void give(const std::string& name) {
    std::lock_guard lock(mutex_);
    names_.erase(name);
  }

 private:
  std::mutex mutex_;
  std::set<std::string> names_;
};

Names& namesInUse() {
  static Names names;
  return names;
}

/** Opens one queue of the interface, in the network namespace of this thread. 0 or -errno. */
int openQueue(const std::string& name, short flags, File& queue) {
  File file(open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC));
  if (!file.valid()) return -errno;
  ifreq request = {};
  name.copy(request.ifr_name, IFNAMSIZ - 1);
  request.ifr_flags = flags;
  const int headerSize = sizeof(NetHeader);
  if (ioctl(file.number(), TUNSETIFF, &request) != 0 || ioctl(file.number(), TUNSETVNETHDRSZ, &headerSize) != 0) {
    return -errno;
  }
  queue = std::move(file);
  return 0;
}

std::string describe(const std::string& name, int error, unsigned pairs) {
  const std::string tap = "the TAP interface " + name + " cannot be opened: ";
  switch (error) {
    case -EPERM:
      return tap + "it needs CAP_NET_ADMIN, or an interface that was made for this user (ip tuntap add " + name +
             " mode tap multi_queue user ...)";
    case -EBUSY:
      return tap + "another program uses it";
    case -EINVAL:
      return tap + "it is no TAP interface" +
             (pairs > 1 ? " with several queues: make it so (ip tuntap add " + name + " mode tap multi_queue)" : "");
    case -E2BIG:
      return tap + "it has too few queues left for " + std::to_string(pairs);
    case -ENOENT:
      return tap + "there is no /dev/net/tun: load the kernel's module tun";
    default:
      return tap + strerror(-error);
  }
}

/** An interface of the host. Each pair has a queue of it. */
class TapPort final : public NetPort {
 public:
  /** The name has been taken; the port gives it back. */
  explicit TapPort(const NetPortOptions& options) : options_(options), pairs_(options.pairs) {
    for (Pair& pair : pairs_) pair.buffer = std::make_unique<uint8_t[]>(kBuffer);
  }
  ~TapPort() override;

  /** 0 or -errno. */
  int open();
  bool carrier() const override;
  void revive() override;
  std::vector<int> sources() const override;
  void signalled(size_t source, uint32_t epollEvents) override;
  void start(uint64_t features) override;
  void stop() override;
  void use(const std::vector<unsigned>& pairs) override;
  Sent send(unsigned pair, const std::vector<iovec>& parts, size_t total) override;
  void flush() override;
  bool peek(unsigned pair, NetFrame& frame, bool wake) override;
  void consume(unsigned pair) override { pairs_[pair].length = 0; }

 private:
  struct Pair {
    File queue;
    /** It has a share of the interface's traffic. */
    std::atomic<bool> attached{true};
    /** May have a frame. */
    std::atomic<bool> ready{true};
    /** Header and frame; `length` bytes of it hold one. */
    std::unique_ptr<uint8_t[]> buffer;
    size_t length = 0;
  };

  void attach(Pair& pair, bool attached);
  void lose();
  unsigned anchor() const;
  bool isThere() const;
  bool isMade() const;
  void setOffload();
  void discard();

  const NetPortOptions options_;
  std::vector<Pair> pairs_;
  uint64_t features_ = 0;
  /** What comes is for a driver that is gone, or for none. */
  bool driverless_ = true;
  std::atomic<bool> gone_{false};
  /** A queue has said that something is wrong. */
  std::atomic<bool> suspect_{false};
};

TapPort::~TapPort() {
  // Closed first: whoever has the name finds the interface free.
  pairs_.clear();
  namesInUse().give(options_.name);
}

int TapPort::open() {
  for (Pair& pair : pairs_) {
    pair.queue = File();
    pair.attached = true;
    pair.ready = true;
    pair.length = 0;
  }
  for (Pair& pair : pairs_) {
    int error = openQueue(options_.name, kFlags | IFF_MULTI_QUEUE, pair.queue);
    // An interface that was made without that has one queue.
    if (error == -EINVAL && pairs_.size() == 1) error = openQueue(options_.name, kFlags, pair.queue);
    if (error == 0) continue;
    for (Pair& opened : pairs_) opened.queue = File();
    return error;
  }
  gone_ = false;
  return 0;
}

/** A queue that is attached; one is at any time. Others look as if their interface were gone. */
unsigned TapPort::anchor() const {
  unsigned pair = 0;
  while (pair + 1 < pairs_.size() && !pairs_[pair].attached) pair++;
  return pair;
}

bool TapPort::isThere() const {
  const File& queue = pairs_[anchor()].queue;
  pollfd state = {queue.number(), 0, 0};
  return queue.valid() && poll(&state, 1, 0) >= 0 && (state.revents & (POLLERR | POLLHUP)) == 0;
}

bool TapPort::carrier() const {
  return !gone_ && isThere();
}

void TapPort::lose() {
  if (!gone_.exchange(true)) options_.notify();
}

/** An interface of the name is there: that, or one that took its place. */
bool TapPort::isMade() const {
  const File any(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  ifreq request = {};
  options_.name.copy(request.ifr_name, IFNAMSIZ - 1);
  return any.valid() && ioctl(any.number(), SIOCGIFINDEX, &request) == 0;
}

void TapPort::revive() {
  if (carrier()) return;
  gone_ = true;
  // One that was taken away is not made by opening it: nobody would have connected it to anything.
  if (isMade() && open() == 0) setOffload();
  options_.notify();
}

std::vector<int> TapPort::sources() const {
  std::vector<int> files;
  for (const Pair& pair : pairs_) files.push_back(pair.queue.number());
  return files;
}

void TapPort::signalled(size_t source, uint32_t epollEvents) {
  pairs_[source].ready = true;
  if ((epollEvents & (EPOLLERR | EPOLLHUP)) != 0) suspect_ = true;
}

void TapPort::start(uint64_t features) {
  features_ = features;
  revive();
  setOffload();
  if (driverless_) discard();
  driverless_ = false;
}

/** What the interface has kept for a queue. */
void TapPort::discard() {
  for (Pair& pair : pairs_) {
    int most = pair.attached && !gone_ ? kMostDiscarded : 0;
    while (most-- > 0 && retried([&] { return read(pair.queue.number(), pair.buffer.get(), kBuffer); }) >= 0) {
    }
  }
}

/** The kernel hands over what the driver understands only; older ones do not know all of it. */
void TapPort::setOffload() {
  using namespace net_feature;
  const struct {
    int feature;
    unsigned offload;
  } offloads[] = {{guestCsum, TUN_F_CSUM}, {guestTso4, TUN_F_TSO4},   {guestTso6, TUN_F_TSO6},
                  {guestEcn, TUN_F_TSO_ECN}, {guestUfo, TUN_F_UFO}};
  unsigned wanted = 0;
  if (hasFeature(features_, guestCsum)) {
    for (const auto& [feature, offload] : offloads) wanted |= hasFeature(features_, feature) ? offload : 0;
  }
  const bool uso = hasFeature(features_, guestUso4) && hasFeature(features_, guestUso6) && wanted != 0;
  const int first = pairs_[anchor()].queue.number();
  if (ioctl(first, TUNSETOFFLOAD, wanted | (uso ? TUN_F_USO4 | TUN_F_USO6 : 0)) != 0) {
    ioctl(first, TUNSETOFFLOAD, wanted);
  }
}

void TapPort::stop() {
  driverless_ = true;
  for (Pair& pair : pairs_) pair.length = 0;
}

void TapPort::use(const std::vector<unsigned>& pairs) {
  if (pairs_.size() == 1 || pairs.empty()) return;
  for (const unsigned pair : pairs) attach(pairs_[pair], true);
  for (unsigned pair = 0; pair < pairs_.size(); pair++) {
    if (!std::binary_search(pairs.begin(), pairs.end(), pair)) attach(pairs_[pair], false);
  }
}

void TapPort::attach(Pair& pair, bool attached) {
  if (pair.attached == attached || gone_) return;
  ifreq request = {};
  request.ifr_flags = attached ? IFF_ATTACH_QUEUE : IFF_DETACH_QUEUE;
  if (ioctl(pair.queue.number(), TUNSETQUEUE, &request) != 0) return lose();
  pair.attached = attached;
  pair.ready = true;
  pair.length = 0;
}

Sent TapPort::send(unsigned pair, const std::vector<iovec>& parts, size_t) {
  const Pair& target = pairs_[pairs_[pair].attached ? pair : anchor()];
  if (gone_) return Sent::bad;
  const ssize_t done = retried([&] {
    return writev(target.queue.number(), parts.data(), static_cast<int>(parts.size()));
  });
  if (done >= 0) return Sent::sent;
  if (done == -EBADFD) lose();
  return done == -EAGAIN ? Sent::dropped : Sent::bad;
}

void TapPort::flush() {
  if (suspect_.exchange(false) && !isThere()) lose();
}

bool TapPort::peek(unsigned index, NetFrame& frame, bool) {
  Pair& pair = pairs_[index];
  if (pair.length == 0) {
    if (gone_ || !pair.attached || !pair.ready) return false;
    ssize_t length;
    do {
      length = retried([&] { return read(pair.queue.number(), pair.buffer.get(), kBuffer); });
    } while (length >= 0 && length < static_cast<ssize_t>(sizeof(NetHeader) + kLeastFrame));
    if (length < 0) {
      pair.ready = false;
      if (length == -EBADFD) lose();
      return false;
    }
    pair.length = static_cast<size_t>(length);
  }
  frame.header = reinterpret_cast<NetHeader*>(pair.buffer.get());
  frame.frame = pair.buffer.get() + sizeof(NetHeader);
  frame.length = pair.length - sizeof(NetHeader);
  return true;
}

}  // namespace

std::unique_ptr<NetPort> createTapPort(const NetPortOptions& options, std::string& reason) {
  if (options.name.empty() || options.name.size() >= IFNAMSIZ) {
    reason = "the name of the TAP interface has " + std::to_string(options.name.size()) + " characters, must have 1 to " +
             std::to_string(IFNAMSIZ - 1);
    return nullptr;
  }
  if (!namesInUse().take(options.name)) {
    reason = "the TAP interface " + options.name +
             " is used by another function of this process, each needs its own: use {vf} in the name";
    return nullptr;
  }
  auto port = std::make_unique<TapPort>(options);
  const int error = port->open();
  if (error == 0) return port;
  reason = describe(options.name, error, options.pairs);
  return nullptr;
}

}  // namespace vhostd::ring
