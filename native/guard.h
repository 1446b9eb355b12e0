#pragma once

#include <type_traits>

/**
 * Accesses to memory that another process can take away. A file that was mapped can be made shorter by whoever holds
 * it, and a device's registers can be switched off: the access then raises SIGBUS or SIGSEGV, which must end the work
 * on that one device, not the process.
 */
namespace vhostd {

/** Runs `body(context)`. False when a memory access inside faulted: the rest of `body` was then skipped. */
bool guardedCall(void (*body)(void*), void* context) noexcept;

/**
 * Runs `body()` with faults caught on this thread. False when it faulted. Calls nest.
 *
 * A fault leaves `body` by a jump: inside there must be no object with a destructor, no lock taken, no allocation, and
 * no call that does any of this. What `body` wrote to captured variables just before the fault may be missing.
 * Costs about ten nanoseconds; put one around a batch of accesses rather than around each.
 */
template <typename Body>
bool guarded(Body&& body) noexcept {
  using Plain = std::remove_reference_t<Body>;
  return guardedCall([](void* context) { (*static_cast<Plain*>(context))(); },
                     const_cast<std::remove_const_t<Plain>*>(&body));
}

}  // namespace vhostd
