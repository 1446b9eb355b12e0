#pragma once

#include <stdint.h>

#include <condition_variable>
#include <mutex>
#include <vector>

namespace vhostd {

/** One system call that may take seconds, made on a thread of its own. */
class SlowCall {
 public:
  virtual ~SlowCall() = default;
  /** On the call's thread. The result or -errno. */
  virtual int64_t run() = 0;
  int64_t result = 0;
};

/** The last close of a big memory file gives its pages back. Owns the fd. */
class SlowClose : public SlowCall {
 public:
  explicit SlowClose(int fd) : fd(fd) {}
  int64_t run() override;

 private:
  const int fd;
};

/** An ioctl on a duplicate of `fd`. */
class SlowIoctl : public SlowCall {
 public:
  /** `argument` is what the kernel reads and writes. */
  SlowIoctl(int fd, unsigned long request, std::vector<uint8_t> argument);
  /** The request takes its argument by value. */
  SlowIoctl(int fd, unsigned long request, unsigned long value);
  ~SlowIoctl() override;
  int64_t run() override;
  std::vector<uint8_t> argument;
  const bool byValue;

 private:
  int fd;
  const unsigned long request;
  const unsigned long value;
};

/** One access to a file at an offset, as a driver means it: `width` bytes at once. */
struct FileAccess {
  uint64_t offset;
  /** 1, 2 or 4. */
  uint32_t width;
  /** Not 0: `value` is written; else it is what was read. */
  uint32_t write;
  uint32_t value;
  /** Bytes that were carried over, or -errno. */
  int32_t result;
};
static_assert(sizeof(FileAccess) == 24, "as in src/native/slow.ts");

/** Accesses to a duplicate of `fd`, one after the other, each whatever came of those before it. */
class SlowAccess : public SlowCall {
 public:
  SlowAccess(int fd, std::vector<FileAccess> accesses);
  ~SlowAccess() override;
  int64_t run() override;
  std::vector<FileAccess> accesses;

 private:
  int fd;
};

/**
 * Slow calls under way. Each has its own thread: a call that hangs delays no other. Not the pool of the engine, whose
 * few threads serve its file system calls.
 */
class SlowCalls {
 public:
  /** `done(context, call)` is called on the call's thread and takes ownership of the call. */
  SlowCalls(void (*done)(void*, SlowCall*), void* context) : done(done), context(context) {}
  ~SlowCalls() { wait(); }
  SlowCalls(const SlowCalls&) = delete;
  SlowCalls& operator=(const SlowCalls&) = delete;

  /** 0 (takes ownership) or -errno: no thread could be started. */
  int start(SlowCall* call);
  /** Until no call is under way. */
  void wait();

 private:
  struct Start {
    SlowCalls* calls;
    SlowCall* call;
  };
  static void* run(void* start);

  void (*const done)(void*, SlowCall*);
  void* const context;
  std::mutex mutex;
  std::condition_variable ended;
  unsigned underWay = 0;
};

}  // namespace vhostd
