#include "slow.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <termios.h>
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

TEST(slow_ioctl_passes_a_value) {
  int terminal = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
  CHECK(terminal >= 0);
  SlowIoctl flush(terminal, TCFLSH, static_cast<unsigned long>(TCIOFLUSH));
  CHECK(flush.run() == 0);
  SlowIoctl unknown(terminal, TCFLSH, 99UL);
  CHECK(unknown.run() == -EINVAL);
  close(terminal);
}

TEST(slow_accesses_have_their_width_and_their_own_results) {
  int file = vhostd_memfd("registers", 16);
  SlowAccess call(file, {
                            {0, 4, 1, 0x89abcdef, 0},
                            {6, 2, 1, 0xffff1234, 0},
                            {9, 1, 1, 0x56, 0},
                            {0, 4, 0, 7, 0},
                            {7, 1, 0, 0xffffffff, 0},
                            {16, 2, 0, 7, 0},
                            {0, 3, 0, 7, 0},
                            {8, 4, 0, 0, 0},
                        });
  CHECK(call.run() == 0);
  CHECK(call.accesses[3].result == 4);
  CHECK(call.accesses[3].value == 0x89abcdef);
  CHECK(call.accesses[4].result == 1);
  CHECK(call.accesses[4].value == 0x12);
  CHECK(call.accesses[5].result == 0);
  CHECK(call.accesses[6].result == -EINVAL);
  CHECK(call.accesses[7].result == 4);
  CHECK(call.accesses[7].value == 0x5600);
  uint8_t bytes[16];
  CHECK(pread(file, bytes, sizeof bytes, 0) == 16);
  CHECK(bytes[4] == 0 && bytes[5] == 0 && bytes[6] == 0x34 && bytes[7] == 0x12 && bytes[8] == 0);
  { SlowAccess neverRun(file, {{0, 4, 0, 0, 0}}); }
  close(file);
  SlowAccess refused(1 << 20, {{0, 4, 0, 0, 0}});
  CHECK(refused.run() == -EBADF);
  int readOnly = open("/dev/zero", O_RDONLY | O_CLOEXEC);
  SlowAccess mixed(readOnly, {{0, 4, 1, 0, 0}, {0, 4, 0, 7, 0}});
  CHECK(mixed.run() == 0);
  CHECK(mixed.accesses[0].result == -EBADF);
  CHECK(mixed.accesses[1].result == 4 && mixed.accesses[1].value == 0);
  close(readOnly);
}

TEST(slow_accesses_run_on_threads) {
  SlowCalls calls(onEnd, nullptr);
  ended = 0;
  int file = vhostd_memfd("registers", 4096);
  for (uint32_t round = 0; round < 64; round++) {
    CHECK(calls.start(new SlowAccess(file, {{4 * round, 4, 1, round, 0}, {4 * round, 4, 0, 0, 0}})) == 0);
  }
  close(file);
  calls.wait();
  CHECK(ended == 64);
  CHECK(lastResult == 0);
}
