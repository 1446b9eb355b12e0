#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstdio>
#include <functional>
#include <thread>

#include "test/check.h"
#include "test/net-rig.h"

using namespace vhostd::ring;

namespace {

constexpr uint64_t kControl = 1ull << 17 | 1ull << 22;
const Parameters kTap = {{"backend", std::string("tap")}, {"tap", std::string("tap-test")}};
/** For local experiments. */
constexpr uint16_t kProtocol = 0x88b5;

/** Runs on a thread with a network of its own; says so where there can be none. */
void inNetworkNamespace(const std::function<void()>& run) {
  std::thread([&run] {
    if (unshare(CLONE_NEWNET) != 0) {
      printf("native: skipped, no network namespace can be made: %s\n", strerror(errno));
    } else if (access("/dev/net/tun", R_OK | W_OK) != 0) {
      printf("native: skipped, /dev/net/tun cannot be opened: %s\n", strerror(errno));
    } else {
      run();
    }
  }).join();
}

/** The host's side of the interface. */
class Host {
 public:
  Host() : packets_(socket(AF_PACKET, SOCK_RAW | SOCK_NONBLOCK | SOCK_CLOEXEC, htons(kProtocol))) {
    ifreq request = {};
    strcpy(request.ifr_name, "tap-test");
    request.ifr_flags = IFF_UP;
    CHECK(ioctl(packets_, SIOCSIFFLAGS, &request) == 0);
    CHECK(ioctl(packets_, SIOCGIFINDEX, &request) == 0);
    index_ = request.ifr_ifindex;
    sockaddr_ll address = {};
    address.sll_family = AF_PACKET;
    address.sll_protocol = htons(kProtocol);
    address.sll_ifindex = index_;
    CHECK(bind(packets_, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
  }
  ~Host() { close(packets_); }

  void send(uint32_t length, uint8_t first) {
    uint8_t bytes[2048];
    fill(bytes, length, first);
    (void)!::send(packets_, bytes, length, 0);
  }
  /** Whether this frame arrives next. */
  bool receives(uint32_t length, uint8_t first) {
    uint8_t expected[2048], bytes[2048];
    fill(expected, length, first);
    ssize_t got = -1;
    CHECK(check::eventually([&] { return (got = recv(packets_, bytes, sizeof bytes, 0)) >= 0; }));
    return got == static_cast<ssize_t>(length) && memcmp(bytes, expected, length) == 0;
  }
  /** An interface is made that stays. */
  static void make() {
    const int tap = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
    ifreq request = {};
    strcpy(request.ifr_name, "tap-test");
    request.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE;
    CHECK(ioctl(tap, TUNSETIFF, &request) == 0 && ioctl(tap, TUNSETPERSIST, 1) == 0);
    close(tap);
  }
  /** The interface is deleted. */
  void remove() {
    struct {
      nlmsghdr header;
      ifinfomsg interface;
    } message = {};
    message.header.nlmsg_len = sizeof message;
    message.header.nlmsg_type = RTM_DELLINK;
    message.header.nlmsg_flags = NLM_F_REQUEST;
    message.interface.ifi_index = index_;
    const int link = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    CHECK(::send(link, &message, sizeof message, 0) == sizeof message);
    close(link);
  }

  /** To everybody, from nobody in particular. */
  static void fill(uint8_t* frame, uint32_t length, uint8_t first) {
    memset(frame, 0xff, kMacBytes);
    for (uint32_t index = kMacBytes; index < length; index++) frame[index] = static_cast<uint8_t>(first + index);
    frame[6] &= 0xfe;
    frame[12] = kProtocol >> 8;
    frame[13] = kProtocol & 0xff;
  }

 private:
  const int packets_;
  int index_ = 0;
};

void transmit(NetRig& rig, uint16_t queue, uint32_t length, uint8_t first, NetHeader header = {}) {
  uint8_t* at = rig.next(queue);
  memcpy(at, &header, sizeof header);
  Host::fill(at + sizeof header, length, first);
  rig.offer(queue, static_cast<uint32_t>(sizeof header) + length, false);
  CHECK(rig.awaitOne(queue));
}

/** Whether this frame arrives on any receive queue; what the kernel sends by itself is skipped. */
bool arrives(NetRig& rig, uint32_t length, uint8_t first) {
  uint8_t expected[2048];
  Host::fill(expected, length, first);
  return check::eventually([&] {
    for (uint16_t queue = 0; queue + 1 < rig.queues; queue += 2) {
      while (!rig.full(queue)) rig.offer(queue, NetRig::kBuffer, true);
      for (uint32_t slot, got; rig.collect(queue, slot, got);) {
        const uint8_t* bytes = rig.buffer(queue, slot);
        if (got == sizeof(NetHeader) + length && memcmp(bytes + sizeof(NetHeader), expected, length) == 0) {
          return bytes[10] == 1 && bytes[11] == 0;
        }
      }
    }
    return false;
  });
}

TEST(net_tap_carries_frames_on_as_many_pairs_as_the_driver_uses) {
  inNetworkNamespace([] {
    NetRig rig(kTap, kNetFeatures | kControl, 2);
    CHECK(rig.function && rig.function->carrier());
    rig.start();
    Host host;
    for (const uint8_t pairs : {1, 2, 1, 2}) {
      CHECK(rig.command({4, 0, pairs, 0}) == 0);
      for (uint8_t count = 0; count < 20; count++) {
        // A driver that sends on a pair that it does not use is served, too.
        transmit(rig, count % 2 == 0 ? 1 : 3, 60 + 70 * count, count);
        CHECK(host.receives(60 + 70 * count, count));
        host.send(60 + 70 * count, count);
        CHECK(arrives(rig, 60 + 70 * count, count));
      }
    }
    const uint64_t bad = rig.function->stats(1).bad;
    CHECK(bad == 0);
    NetHeader garbage = {};
    garbage.gsoType = 0x7f;
    garbage.gsoSize = 1;
    transmit(rig, 1, 60, 0, garbage);
    transmit(rig, 1, 13, 0);
    CHECK(rig.function->stats(1).bad == 2);
    rig.function->quiesce();
    host.send(100, 1);
    usleep(5000);
    CHECK(rig.function->inFlight() == 0);
    rig.function->unquiesce();
    CHECK(arrives(rig, 100, 1));
    CHECK(rig.function->failure().empty());
  });
}

TEST(net_tap_that_vanishes_under_load_takes_the_carrier_with_it) {
  inNetworkNamespace([] {
    NetRig rig(kTap, kNetFeatures | kControl, 2);
    CHECK(rig.function != nullptr);
    for (int round = 0; round < 2; round++) {
      if (round > 0) Host::make();
      rig.start();
      CHECK(rig.function->carrier());
      CHECK(rig.command({4, 0, 2, 0}) == 0);
      uint64_t signalled;
      Host host;
      for (uint8_t count = 0; count < 50; count++) {
        transmit(rig, 1, 60, count);
        host.send(60, count);
      }
      while (read(rig.function->events(), &signalled, sizeof signalled) > 0) {
      }
      host.remove();
      // Noticed without a frame that is sent in vain.
      CHECK(check::eventually([&] { return !rig.function->carrier(); }));
      CHECK(check::eventually([&] { return read(rig.function->events(), &signalled, sizeof signalled) > 0; }));
      const uint64_t bad = rig.function->stats(1).bad;
      transmit(rig, 1, 60, 0);
      CHECK(rig.function->stats(1).bad == bad + 1 && rig.function->failure().empty());
      rig.stop();
    }
    // Made again, and the operator says so.
    Host::make();
    rig.start();
    CHECK(rig.function->carrier());
    { Host().remove(); }
    CHECK(check::eventually([&] { return !rig.function->carrier(); }));
    Host::make();
    CHECK(rig.function->configure({{"link", true}}).empty());
    CHECK(rig.function->carrier());
    Host host;
    host.send(60, 7);
    CHECK(arrives(rig, 60, 7));
  });
}

/** Nobody waits for its events then. */
TEST(net_tap_that_vanishes_without_a_worker_is_missed_at_the_next_start) {
  inNetworkNamespace([] {
    for (const bool parked : {false, true}) {
      NetRig rig(kTap);
      CHECK(rig.function != nullptr);
      if (parked) {
        rig.start();
        rig.function->requestStop(Stop::park);
        CHECK(check::eventually([&] { return rig.function->tryPark(1); }));
      }
      { Host().remove(); }
      uint64_t signalled;
      while (read(rig.function->events(), &signalled, sizeof signalled) > 0) {
      }
      if (parked) {
        CHECK(rig.function->start(kNetFeatures).empty());
      } else {
        rig.start();
      }
      CHECK(read(rig.function->events(), &signalled, sizeof signalled) > 0);
      CHECK(!rig.function->carrier());
      CHECK(if_nametoindex("tap-test") == 0);
      transmit(rig, 1, 60, 0);
      CHECK(rig.function->stats(1).bad == 1);
    }
  });
}

TEST(net_tap_keeps_no_frames_for_the_next_driver) {
  inNetworkNamespace([] {
    NetRig rig(kTap, kNetFeatures | kControl, 2);
    CHECK(rig.function != nullptr);
    Host host;
    const auto receives = [&] {
      for (uint32_t length = 60; length < 80; length++) host.send(length, 1);
    };
    const auto receivedAfterStart = [&] {
      const uint64_t before = rig.function->stats(0).completed + rig.function->stats(2).completed;
      host.send(100, 2);
      CHECK(arrives(rig, 100, 2));
      return rig.function->stats(0).completed + rig.function->stats(2).completed - before;
    };
    receives();
    rig.start();
    // From here on both queues are attached.
    CHECK(rig.command({4, 0, 2, 0}) == 0);
    CHECK(receivedAfterStart() < 20);
    rig.stop();
    receives();
    rig.start();
    CHECK(receivedAfterStart() < 20);
    // The driver is the same: they are its own.
    rig.function->requestStop(Stop::park);
    CHECK(check::eventually([&] { return rig.function->tryPark(1); }));
    receives();
    CHECK(rig.function->start(kNetFeatures | kControl).empty());
    CHECK(receivedAfterStart() >= 20);
  });
}

TEST(net_tap_is_for_one_function) {
  inNetworkNamespace([] {
    for (const uint16_t pairs : {1, 2}) {
      NetRig first(kTap, kNetFeatures | kControl, pairs);
      CHECK(first.function != nullptr);
      const NetRig second(kTap, kNetFeatures | kControl, pairs);
      CHECK(!second.function && second.reason.find("use {vf} in the name") != std::string::npos);
    }
    // What could not be had is not kept.
    const Parameters missing = {{"backend", std::string("tap")}, {"tap", std::string("lo")}};
    for (int attempt = 0; attempt < 2; attempt++) {
      CHECK(NetRig(missing).reason.find("cannot be opened") != std::string::npos);
    }
  });
}

TEST(net_tap_that_cannot_be_opened_is_refused) {
  inNetworkNamespace([] {
    NetRig rig({{"backend", std::string("tap")}, {"tap", std::string("lo")}});
    CHECK(!rig.function && rig.reason.find("the TAP interface lo cannot be opened") != std::string::npos);
  });
}

}  // namespace
