#include "forwarder.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "priority.h"
#include "thread.h"

namespace vhostd {
namespace {

/** The token of orders; connections are numbered from 1. */
constexpr uint64_t ORDER = 0;
constexpr unsigned ORDER_RESULTS = 1024;
/** So many kicks go by before a connection costs the thread a wake-up. */
constexpr unsigned KICK_RESULTS = 256;

/** A request that gives a result each time that `fd` is signalled, whatever its counter holds. */
io_uring_sqe& watch(IoRing& ring, int fd, uint64_t token) {
  io_uring_sqe& request = ring.next(IORING_OP_POLL_ADD, fd, token);
  request.poll32_events = POLLIN;
  request.len = IORING_POLL_ADD_MULTI;
  return request;
}

}  // namespace

Forwarder::Connection::~Connection() {
  // At once: what is left of the ring's requests ends with results too.
  if (ring.isOpen()) ring.signalWithResults(-1);
  if (kick >= 0) close(kick);
}

int Forwarder::start() {
  if (ring.isOpen()) return 0;
  int failed = ring.open(4, ORDER_RESULTS);
  if (failed < 0) return failed;
  orders = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  failed = orders < 0 ? -errno : startThread(&thread, run, this);
  if (failed == 0) return 0;
  if (orders >= 0) close(orders);
  ring.close();
  return failed;
}

void Forwarder::stop() {
  if (!ring.isOpen()) return;
  perform([this] {
    connections.clear();
    ended = true;
    return 0;
  });
  pthread_join(thread, nullptr);
  ended = false;
  close(orders);
  ring.close();
}

int Forwarder::connect(uint64_t number, int kick, int doorbell) {
  if (!ring.isOpen()) return -ESRCH;
  return perform([=] {
    Connection& connection = connections[number];
    int failed = connection.ring.open(2, KICK_RESULTS);
    if (failed == 0) failed = connection.ring.signalWithResults(doorbell);
    if (failed == 0) {
      connection.kick = fcntl(kick, F_DUPFD_CLOEXEC, 3);
      failed = connection.kick < 0 ? -errno : forward(number, connection);
    }
    if (failed < 0) connections.erase(number);
    return failed;
  });
}

void Forwarder::disconnect(uint64_t number) {
  if (!ring.isOpen()) return;
  perform([=] {
    connections.erase(number);
    return 0;
  });
}

int Forwarder::perform(const std::function<int()>& work) {
  std::lock_guard<std::mutex> one(callers);
  std::unique_lock<std::mutex> lock(mutex);
  order = &work;
  eventfd_write(orders, 1);
  performed.wait(lock, [this] { return order == nullptr; });
  return result;
}

void Forwarder::performOrder() {
  std::lock_guard<std::mutex> lock(mutex);
  if (order == nullptr) return;
  result = (*order)();
  order = nullptr;
  performed.notify_one();
}

void Forwarder::watchOrders() { watch(ring, orders, ORDER); }

int Forwarder::forward(uint64_t number, Connection& connection) {
  // The watch ends when the ring of results is full; then, and only then, the request that it is linked with is made:
  // a result in the thread's own ring.
  watch(connection.ring, connection.kick, 0).flags = IOSQE_IO_LINK;
  io_uring_sqe& full = connection.ring.next(IORING_OP_MSG_RING, ring.descriptor(), 0);
  full.off = number;
  full.flags = IOSQE_CQE_SKIP_SUCCESS;
  int submitted = connection.ring.submit(0);
  return submitted < 0 ? submitted : submitted == 2 ? 0 : -EAGAIN;
}

void Forwarder::refill(uint64_t number) {
  auto found = connections.find(number);
  // Numbers are not used again: this one is of a connection that was cut.
  if (found == connections.end()) return;
  found->second.ring.discard();
  // What was kicked in between is not lost: a counter that is not zero rings when it is watched.
  forward(number, found->second);
}

void* Forwarder::run(void* self) {
  nameThread("vhostd-forward");
  preferThisThread();
  static_cast<Forwarder*>(self)->loop();
  return nullptr;
}

void Forwarder::loop() {
  watchOrders();
  while (!ended) {
    // The kernel forwards while the thread waits here.
    ring.submit(1);
    ring.take([this](const io_uring_cqe& done) {
      if (done.user_data != ORDER) return refill(done.user_data);
      if (!(done.flags & IORING_CQE_F_MORE)) watchOrders();
      performOrder();
    });
  }
}

}  // namespace vhostd
