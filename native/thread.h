#pragma once

#include <pthread.h>

namespace vhostd {

/**
 * Starts a thread that takes no signals sent to the process, so that the engine's handlers run on the engine's threads;
 * faults of its own accesses still reach it. 0 or -errno. `thread` null: detached.
 */
int startThread(pthread_t* thread, void* (*run)(void*), void* argument);

/** What the calling thread is called in top and debuggers; at most 15 characters. */
void nameThread(const char* name);

}  // namespace vhostd
