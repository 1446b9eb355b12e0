#include "guard.h"

#include <setjmp.h>
#include <signal.h>
#include <string.h>

namespace vhostd {
namespace {

/**
 * Where the innermost guarded zone of this thread continues after a fault. Initial-exec: the handler must not reach
 * the allocator, as the first access to ordinary thread-local storage of a loaded library would.
 */
thread_local __attribute__((tls_model("initial-exec"))) sigjmp_buf* landing = nullptr;

// Our handler blocks no signal, so the jump has no mask to restore. TSan's, which stands before ours, blocks them all.
#ifdef __SANITIZE_THREAD__
constexpr int SAVE_MASK = 1;
#else
constexpr int SAVE_MASK = 0;
#endif

struct sigaction previousBus;
struct sigaction previousSegv;

/** Hands a fault that is not ours to the handler that was there before (the JavaScript engine has its own). */
void chain(int number, siginfo_t* info, void* context) {
  const struct sigaction& previous = number == SIGBUS ? previousBus : previousSegv;
  if (previous.sa_flags & SA_SIGINFO) {
    previous.sa_sigaction(number, info, context);
    return;
  }
  if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(number);
    return;
  }
  // The access is repeated on return and then ends the process the ordinary way, with a core dump that shows it. A
  // signal that someone sent is not repeated by itself.
  signal(number, SIG_DFL);
  if (info->si_code <= 0) raise(number);
}

void onFault(int number, siginfo_t* info, void* context) {
  // si_code > 0: raised by the kernel for an access, not sent by a process.
  if (landing != nullptr && info->si_code > 0) siglongjmp(*landing, 1);
  chain(number, info, context);
}

bool install() {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = onFault;
  // ONSTACK: the fault may be a stack overflow, which is the engine's to handle. NODEFER: the handler is left by a
  // jump, so the signal must not stay blocked.
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  sigaction(SIGBUS, &action, &previousBus);
  sigaction(SIGSEGV, &action, &previousSegv);
  return true;
}

}  // namespace

bool guardedCall(void (*body)(void*), void* context) noexcept {
  // Once; from then on it is one load, which is less than std::call_once needs.
  [[maybe_unused]] static const bool installed = install();
  sigjmp_buf here;
  sigjmp_buf* const outer = landing;
  if (sigsetjmp(here, SAVE_MASK) != 0) {
    landing = outer;
    return false;
  }
  landing = &here;
  body(context);
  landing = outer;
  return true;
}

}  // namespace vhostd
