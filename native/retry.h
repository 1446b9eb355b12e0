#pragma once

#include <errno.h>

namespace vhostd {

/** The result of a system call, or -errno; a call that a signal interrupted is made again. */
template <typename Call>
auto retried(Call call) -> decltype(call()) {
  for (;;) {
    auto result = call();
    if (result >= 0) return result;
    if (errno != EINTR) return -errno;
  }
}

/** The result of a system call, or -errno. */
template <typename Result>
Result orErrno(Result result) {
  return result < 0 ? static_cast<Result>(-errno) : result;
}

}  // namespace vhostd
