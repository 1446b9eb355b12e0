#include <dirent.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <atomic>
#include <vector>

#include "symbols.h"
#include "test/check.h"

namespace {

struct Test {
  const char* name;
  void (*run)();
};

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

std::atomic<unsigned> passed{0};
std::atomic<unsigned> failed{0};

int openFds() {
  DIR* directory = opendir("/proc/self/fd");
  int count = 0;
  while (readdir(directory) != nullptr) count++;
  closedir(directory);
  return count;
}

}  // namespace

void check::add(const char* name, void (*run)()) { tests().push_back({name, run}); }

void check::that(bool holds, const char* expression, const char* file, int line) {
  (holds ? passed : failed)++;
  if (!holds) fprintf(stderr, "%s:%d: failed: %s\n", file, line, expression);
}

void check::pause() { usleep(1000); }

/** With an argument: only the tests whose names contain it. */
int main(int argc, char** argv) {
  // Makes the file that signals are made with: it stays open as long as the process lives.
  vhostd_signal_eventfd(-1);
  unsigned ran = 0;
  for (const Test& test : tests()) {
    if (argc > 1 && strstr(test.name, argv[1]) == nullptr) continue;
    ran++;
    int before = openFds();
    test.run();
    check::that(openFds() == before, "as many open fds as before", test.name, 0);
  }
  printf("native: %u tests, %u checks passed, %u failed\n", ran, passed.load(), failed.load());
  return failed > 0 || ran == 0;
}
