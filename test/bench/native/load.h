#pragma once

#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

/** What the programs share that drive split virtqueues (VIRTIO 1.2, 2.7) in the guest memory of a front-end. */
namespace load {

/** The descriptor that guest memory comes as. */
constexpr int kMemory = 3;
constexpr double kWarmUpSeconds = 0.1;
/** VIRTQ_DESC_F_WRITE. */
constexpr uint16_t kWrite = 2;

struct Descriptor {
  uint64_t address;
  uint32_t length;
  uint16_t flags;
  uint16_t next;
};

struct UsedElement {
  uint32_t id;
  uint32_t length;
};

[[noreturn]] inline void fail(const char* what) {
  perror(what);
  exit(1);
}

/** Seconds. */
inline double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + time.tv_nsec * 1e-9;
}

inline uint64_t number(const char* text) { return strtoull(text, nullptr, 10); }

inline void kick(int eventfd) {
  const uint64_t one = 1;
  if (write(eventfd, &one, sizeof one) != sizeof one) fail("kick");
}

/** Guest memory that begins at a guest-physical address, mapped as long as the program runs. */
class GuestMemory {
 public:
  explicit GuestMemory(uint64_t gpa) : gpa_(gpa) {
    struct stat file;
    if (fstat(kMemory, &file) != 0) fail("guest memory");
    void* place = mmap(nullptr, static_cast<size_t>(file.st_size), PROT_READ | PROT_WRITE, MAP_SHARED, kMemory, 0);
    if (place == MAP_FAILED) fail("mmap");
    begin_ = static_cast<uint8_t*>(place);
  }

  template <typename T>
  T* at(uint64_t address) const {
    return reinterpret_cast<T*>(begin_ + (address - gpa_));
  }

  uint64_t addressOf(const void* place) const {
    return gpa_ + static_cast<uint64_t>(static_cast<const uint8_t*>(place) - begin_);
  }

 private:
  const uint64_t gpa_;
  uint8_t* begin_;
};

}  // namespace load
