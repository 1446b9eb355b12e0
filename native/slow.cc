#include "slow.h"

#include <errno.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <memory>
#include <utility>

#include "symbols.h"
#include "thread.h"

namespace vhostd {

int64_t SlowClose::run() { return vhostd_close(fd); }

SlowIoctl::SlowIoctl(int fd, unsigned long request, std::vector<uint8_t> argument)
    : argument(std::move(argument)), byValue(false), fd(vhostd_dup(fd)), request(request), value(0) {}

SlowIoctl::SlowIoctl(int fd, unsigned long request, unsigned long value)
    : byValue(true), fd(vhostd_dup(fd)), request(request), value(value) {}

SlowIoctl::~SlowIoctl() {
  if (fd >= 0) close(fd);
}

int64_t SlowIoctl::run() {
  if (fd < 0) return fd;
  int status = byValue ? ioctl(fd, request, value) : ioctl(fd, request, argument.data());
  int64_t outcome = status < 0 ? -errno : status;
  close(std::exchange(fd, -1));  // here: the last close of a device can be slow too
  return outcome;
}

SlowAccess::SlowAccess(int fd, std::vector<FileAccess> accesses) : accesses(std::move(accesses)), fd(vhostd_dup(fd)) {}

SlowAccess::~SlowAccess() {
  if (fd >= 0) close(fd);
}

int64_t SlowAccess::run() {
  if (fd < 0) return fd;
  for (FileAccess& access : accesses) {
    uint8_t* bytes = reinterpret_cast<uint8_t*>(&access.value);
    auto offset = static_cast<int64_t>(access.offset);
    if (access.width != 1 && access.width != 2 && access.width != 4) {
      access.result = -EINVAL;
    } else if (access.write != 0) {
      access.result = static_cast<int32_t>(vhostd_pwrite(fd, bytes, access.width, offset));
    } else {
      access.value = 0;
      access.result = static_cast<int32_t>(vhostd_pread(fd, bytes, access.width, offset));
    }
  }
  close(std::exchange(fd, -1));  // here, as after an ioctl
  return 0;
}

int SlowCalls::start(SlowCall* call) {
  auto start = std::make_unique<Start>(Start{this, call});
  std::lock_guard<std::mutex> lock(mutex);
  int result = startThread(nullptr, run, start.get());
  if (result < 0) return result;
  start.release();
  underWay++;
  return 0;
}

void SlowCalls::wait() {
  std::unique_lock<std::mutex> lock(mutex);
  ended.wait(lock, [this] { return underWay == 0; });
}

void* SlowCalls::run(void* argument) {
  nameThread("vhostd-slow");
  std::unique_ptr<Start> start(static_cast<Start*>(argument));
  SlowCalls& calls = *start->calls;
  start->call->result = start->call->run();
  calls.done(calls.context, start->call);
  // Signalled under the lock: whoever waits may destroy `calls` as soon as it is released.
  std::lock_guard<std::mutex> lock(calls.mutex);
  if (--calls.underWay == 0) calls.ended.notify_all();
  return nullptr;
}

}  // namespace vhostd
