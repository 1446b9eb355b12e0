#include "io-ring.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "retry.h"

namespace vhostd {
namespace {

// Both came with Linux 6.15; headers may be older.
constexpr unsigned FEATURE_NO_IOWAIT = 1U << 17;
constexpr unsigned ENTER_NO_IOWAIT = 1U << 7;

void* map(int fd, size_t size, off_t what) {
  void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, what);
  return at == MAP_FAILED ? nullptr : at;
}

}  // namespace

int IoRing::open(unsigned requestCount, unsigned resultCount) {
  io_uring_params parameters = {};
  parameters.flags = IORING_SETUP_CQSIZE | IORING_SETUP_COOP_TASKRUN;
  parameters.cq_entries = resultCount;
  fd = static_cast<int>(syscall(SYS_io_uring_setup, requestCount, &parameters));
  if (fd < 0) return -errno;
  if (!(parameters.features & FEATURE_NO_IOWAIT)) {
    close();
    return -ENOSYS;
  }
  const io_sqring_offsets& sq = parameters.sq_off;
  const io_cqring_offsets& cq = parameters.cq_off;
  ringsSize = std::max<size_t>(sq.array + parameters.sq_entries * sizeof(unsigned),
                               cq.cqes + parameters.cq_entries * sizeof(io_uring_cqe));
  requestsSize = parameters.sq_entries * sizeof(io_uring_sqe);
  rings = static_cast<char*>(map(fd, ringsSize, IORING_OFF_SQ_RING));
  requests = static_cast<io_uring_sqe*>(map(fd, requestsSize, IORING_OFF_SQES));
  if (rings == nullptr || requests == nullptr) {
    close();
    return -ENOMEM;
  }
  auto word = [this](unsigned offset) { return reinterpret_cast<unsigned*>(rings + offset); };
  requestsTail = word(sq.tail);
  requestsFlags = word(sq.flags);
  resultsHead = word(cq.head);
  resultsTail = word(cq.tail);
  requestsMask = *word(sq.ring_mask);
  resultsMask = *word(cq.ring_mask);
  results = reinterpret_cast<io_uring_cqe*>(rings + cq.cqes);
  // Requests are handed over in the order of their places.
  for (unsigned place = 0; place < parameters.sq_entries; place++) word(sq.array)[place] = place;
  return 0;
}

void IoRing::close() {
  if (rings != nullptr) munmap(rings, ringsSize);
  if (requests != nullptr) munmap(requests, requestsSize);
  if (fd >= 0) ::close(fd);
  rings = nullptr;
  requests = nullptr;
  fd = -1;
}

int IoRing::signalWithResults(int eventfd) {
  const bool given = eventfd >= 0;
  const unsigned operation = given ? IORING_REGISTER_EVENTFD : IORING_UNREGISTER_EVENTFD;
  long result = syscall(SYS_io_uring_register, fd, operation, given ? &eventfd : nullptr, given ? 1 : 0);
  return result < 0 ? -errno : 0;
}

io_uring_sqe& IoRing::next(uint8_t operation, int target, uint64_t token) {
  io_uring_sqe& request = requests[(*requestsTail + pending++) & requestsMask];
  memset(&request, 0, sizeof request);
  request.opcode = operation;
  request.fd = target;
  request.user_data = token;
  return request;
}

int IoRing::submit(unsigned wait) {
  const unsigned count = pending;
  __atomic_store_n(requestsTail, *requestsTail + count, __ATOMIC_RELEASE);
  pending = 0;
  return enter(count, wait, wait > 0 ? IORING_ENTER_GETEVENTS | ENTER_NO_IOWAIT : 0);
}

void IoRing::discard() {
  for (;;) {
    __atomic_store_n(resultsHead, __atomic_load_n(resultsTail, __ATOMIC_ACQUIRE), __ATOMIC_RELEASE);
    if (!(__atomic_load_n(requestsFlags, __ATOMIC_ACQUIRE) & IORING_SQ_CQ_OVERFLOW)) return;
    if (enter(0, 0, IORING_ENTER_GETEVENTS) < 0) return;
  }
}

int IoRing::enter(unsigned submitted, unsigned wait, unsigned flags) {
  return static_cast<int>(orErrno(syscall(SYS_io_uring_enter, fd, submitted, wait, flags, nullptr, 0)));
}

}  // namespace vhostd
