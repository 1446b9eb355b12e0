/**
 * Round trips between two threads by eventfds, bare or with a third in the way there. All on one CPU.
 *
 *   round-trip bare|relay|epoll|thread CPU SECONDS    prints nanoseconds of one round trip
 *
 * bare:   measuring thread → doorbell → answering thread → answer → measuring thread; two wake-ups
 * relay:  measuring thread → kick → relay → doorbell → answering thread → answer → measuring thread; three
 * epoll:  the same where the kernel does not forward
 * thread: the same with a thread in the relay's place that only reads and writes: the least that three threads take
 */
#include <sched.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "relay.h"

namespace {

/** Ends a thread. */
constexpr uint64_t kEnd = 1 << 20;
constexpr int kRoundsBetweenLooks = 256;
constexpr double kWarmUpSeconds = 0.05;

double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + time.tv_nsec * 1e-9;
}

void check(bool good, const char* what) {
  if (good) return;
  perror(what);
  exit(1);
}

void add(int fd, uint64_t value) { check(write(fd, &value, sizeof value) == sizeof value, "write"); }

uint64_t take(int fd) {
  uint64_t value = 0;
  check(read(fd, &value, sizeof value) == sizeof value, "read");
  return value;
}

/** Each signal of one eventfd is one of the other. */
std::thread pass(int from, int to) {
  return std::thread([=] {
    while (take(from) < kEnd) add(to, 1);
  });
}

/** Nanoseconds of one round trip over that time. */
double measure(int there, int back, double seconds) {
  const double begin = now();
  uint64_t rounds = 0;
  double elapsed;
  do {
    for (int round = 0; round < kRoundsBetweenLooks; round++) {
      add(there, 1);
      take(back);
    }
    rounds += kRoundsBetweenLooks;
    elapsed = now() - begin;
  } while (elapsed < seconds);
  return elapsed / rounds * 1e9;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const bool bare = strcmp(argv[1], "bare") == 0;
  const bool byEpoll = strcmp(argv[1], "epoll") == 0;
  const bool relayed = byEpoll || strcmp(argv[1], "relay") == 0;
  cpu_set_t cpu;
  CPU_ZERO(&cpu);
  CPU_SET(atoi(argv[2]), &cpu);
  // Before there are threads: they inherit it.
  check(sched_setaffinity(0, sizeof cpu, &cpu) == 0, "sched_setaffinity");

  const int doorbell = eventfd(0, EFD_CLOEXEC);
  const int answer = eventfd(0, EFD_CLOEXEC);
  const int kick = bare ? doorbell : eventfd(0, EFD_CLOEXEC);
  check(doorbell >= 0 && answer >= 0 && kick >= 0, "eventfd");
  vhostd::Relay relay(byEpoll ? vhostd::Relay::Forward::never : vhostd::Relay::Forward::whereKernelCan);
  if (relayed) check(relay.start() == 0 && relay.connect(kick, doorbell) > 0, "relay");
  std::thread between;
  if (!bare && !relayed) between = pass(kick, doorbell);
  std::thread answering = pass(doorbell, answer);

  measure(kick, answer, kWarmUpSeconds);
  printf("%.1f\n", measure(kick, answer, atof(argv[3])));
  relay.stop();
  if (between.joinable()) {
    add(kick, kEnd);
    between.join();
  }
  add(doorbell, kEnd);
  answering.join();
  return 0;
}
