#include "thread.h"

#include <signal.h>

#include <initializer_list>

namespace vhostd {

int startThread(pthread_t* thread, void* (*run)(void*), void* argument) {
  sigset_t blocked;
  sigset_t previous;
  sigfillset(&blocked);
  for (int fault : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGABRT}) sigdelset(&blocked, fault);
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, 1 << 20);
  if (thread == nullptr) pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  // A new thread inherits the mask of the one that starts it.
  pthread_sigmask(SIG_SETMASK, &blocked, &previous);
  pthread_t started;
  int error = pthread_create(&started, &attributes, run, argument);
  pthread_sigmask(SIG_SETMASK, &previous, nullptr);
  pthread_attr_destroy(&attributes);
  if (thread != nullptr) *thread = started;
  return -error;
}

void nameThread(const char* name) { pthread_setname_np(pthread_self(), name); }

}  // namespace vhostd
