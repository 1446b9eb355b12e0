#include "slow.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <atomic>

#include "symbols.h"
#include "test/check.h"

using namespace vhostd;

namespace {

std::atomic<int> ended{0};
std::atomic<int64_t> lastResult{0};

void onEnd(void*, SlowCall* call) {
  lastResult = call->result;
  delete call;
  ended++;
}

}  // namespace

TEST(slow_calls_end_and_are_waited_for) {
  SlowCalls calls(onEnd, nullptr);
  ended = 0;
  for (int round = 0; round < 64; round++) {
    int fd = vhostd_memfd("slow", 4096);
    CHECK(calls.start(new SlowClose(fd)) == 0);
  }
  calls.wait();
  CHECK(ended == 64);
  CHECK(lastResult == 0);
}

TEST(slow_ioctl_writes_its_argument) {
  int pair[2];
  CHECK(vhostd_socket_pair(pair) == 0);
  CHECK(write(pair[0], "12345", 5) == 5);
  SlowIoctl call(pair[1], FIONREAD, {0, 0, 0, 0});
  CHECK(call.run() == 0);
  CHECK(call.argument[0] == 5);
  SlowIoctl refused(1 << 20, FIONREAD, {0, 0, 0, 0});
  CHECK(refused.run() < 0);
  { SlowIoctl neverRun(pair[0], FIONREAD, {0, 0, 0, 0}); }
  close(pair[0]);
  close(pair[1]);
}
