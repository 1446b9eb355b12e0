#include "guard.h"

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "test/check.h"

using vhostd::guarded;

namespace {

constexpr size_t PAGE = 4096;

/** A page whose file was cut away: reads and writes raise SIGBUS. */
struct LostPage {
  LostPage() {
    fd = memfd_create("lost", MFD_CLOEXEC);
    (void)!ftruncate(fd, PAGE);
    bytes = static_cast<volatile unsigned char*>(mmap(nullptr, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    (void)!ftruncate(fd, 0);
  }
  ~LostPage() {
    munmap(const_cast<unsigned char*>(bytes), PAGE);
    close(fd);
  }
  int fd;
  volatile unsigned char* bytes;
};

void* faultOften(void*) {
  LostPage page;
  long faults = 0;
  for (int round = 0; round < 500; round++) {
    if (!guarded([&] { page.bytes[round] = 1; })) faults++;
  }
  return reinterpret_cast<void*>(faults);
}

/** The status of a child that runs `body`. */
template <typename Body>
int inChild(Body body) {
  pid_t child = fork();
  if (child == 0) {
    body();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status;
}

}  // namespace

TEST(guard_catches_a_lost_page_and_a_missing_one) {
  LostPage page;
  CHECK(!guarded([&] { page.bytes[0] = 1; }));
  int value = 0;
  CHECK(!guarded([&] { value = page.bytes[1]; }));
  auto* nowhere = reinterpret_cast<volatile char*>(16);
  CHECK(!guarded([&] { *nowhere = 1; }));
  CHECK(guarded([&] { value = 7; }));
  CHECK(value == 7);
}

TEST(guard_nests) {
  LostPage page;
  bool inner = true;
  bool after = false;
  bool outer = guarded([&] {
    inner = guarded([&] { page.bytes[0] = 1; });
    after = true;
    page.bytes[1] = 1;
  });
  CHECK(!inner);
  CHECK(after);
  CHECK(!outer);
}

TEST(guard_is_a_matter_of_each_thread) {
  pthread_t threads[4];
  for (pthread_t& thread : threads) pthread_create(&thread, nullptr, faultOften, nullptr);
  for (pthread_t thread : threads) {
    void* faults = nullptr;
    pthread_join(thread, &faults);
    CHECK(reinterpret_cast<long>(faults) == 500);
  }
}

TEST(guard_leaves_other_faults_to_the_handler_before) {
  // The child must die of a fault outside a guarded zone, also after one inside was caught.
  int status = inChild([] {
    close(STDERR_FILENO);  // sanitizers report the fault, which is wanted here
    LostPage page;
    guarded([&] { page.bytes[0] = 1; });
    page.bytes[0] = 1;
  });
  CHECK(status != 0);
  // A signal that was sent is no access, and is not swallowed inside a guarded zone.
  status = inChild([] {
    close(STDERR_FILENO);
    guarded([] { kill(getpid(), SIGBUS); });
  });
  CHECK(status != 0);
}
