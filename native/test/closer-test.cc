#include "closer.h"

#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "symbols.h"
#include "test/check.h"

using namespace vhostd;

namespace {

/** A TCP socket whose close takes until its peer is closed, or a minute. */
struct Lingering {
  int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  int peer;

  Lingering() {
    int small = 4096;
    setsockopt(listener, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    sockaddr_in name = {};
    name.sin_family = AF_INET;
    name.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof name;
    bind(listener, reinterpret_cast<sockaddr*>(&name), sizeof name);
    listen(listener, 1);
    getsockname(listener, reinterpret_cast<sockaddr*>(&name), &length);
    CHECK(connect(fd, reinterpret_cast<sockaddr*>(&name), sizeof name) == 0);
    peer = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
    static char bytes[65536];
    while (send(fd, bytes, sizeof bytes, MSG_DONTWAIT) > 0) {
    }
    linger patience = {1, 60};
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &patience, sizeof patience);
  }

  /** Lets a close that is under way end. */
  void release() {
    close(peer);
    close(listener);
  }
};

}  // namespace

// Not on the stack: the thread that hands out work is never waited for.
TEST(a_close_that_takes_long_holds_up_its_lane_only) {
  Closer& closer = *new Closer(8);
  Lingering slow;
  closer.close(1, slow.fd);
  for (int count = 0; count < 10; count++) closer.close(1, vhostd_eventfd());
  for (uint64_t lane = 2; lane < 40; lane++) closer.close(lane, vhostd_eventfd());
  CHECK(check::eventually([&] { return closer.pending(0) == 11; }));
  CHECK(closer.pending(1) == 11);
  CHECK(closer.pending(2) == 0);
  CHECK(!closer.wait(10));
  slow.release();
  CHECK(closer.wait(10000));
  CHECK(closer.pending(1) == 0);
}

TEST(closes_wait_when_every_thread_is_held_up) {
  Closer& closer = *new Closer(2);
  Lingering slow[2];
  closer.close(1, slow[0].fd);
  closer.close(2, slow[1].fd);
  closer.close(3, vhostd_eventfd());
  CHECK(!closer.wait(4 * Closer::PATIENCE));
  CHECK(closer.pending(3) == 1);
  slow[0].release();
  CHECK(check::eventually([&] { return closer.pending(3) == 0; }));
  CHECK(closer.pending(2) == 1);
  slow[1].release();
  CHECK(closer.wait(10000));
}
