#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <utility>

namespace vhostd::ring {

/** Owns a file descriptor. */
class File {
 public:
  File() = default;
  explicit File(int number) : number_(number) {}
  File(File&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  File& operator=(File&& other) noexcept {
    std::swap(number_, other.number_);
    return *this;
  }
  ~File() {
    if (number_ >= 0) ::close(number_);
  }

  /** A duplicate of a borrowed descriptor; not `valid()` where that fails. */
  static File duplicate(int number) { return File(::fcntl(number, F_DUPFD_CLOEXEC, 0)); }

  int number() const { return number_; }
  bool valid() const { return number_ >= 0; }

 private:
  int number_ = -1;
};

}  // namespace vhostd::ring
