#pragma once

/**
 * A test driver without a framework: TEST(name) { CHECK(...); }. Each test also checks that it leaves as many open fds
 * as it found.
 */
namespace check {

void add(const char* name, void (*run)());
/** Counts the check; prints a failed one. */
void that(bool holds, const char* expression, const char* file, int line);

/** Waits until `holds()`, for at most ten seconds. */
template <typename Condition>
bool eventually(Condition holds);

void pause();

}  // namespace check

#define CHECK(...) check::that(static_cast<bool>(__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)

#define TEST(name)                                        \
  static void test_##name();                              \
  static const bool registered_##name = [] {              \
    check::add(#name, test_##name);                       \
    return true;                                          \
  }();                                                    \
  static void test_##name()

template <typename Condition>
bool check::eventually(Condition holds) {
  for (int tries = 0; tries < 10000; tries++) {
    if (holds()) return true;
    pause();
  }
  return false;
}
