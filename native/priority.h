#pragma once

namespace vhostd {

/**
 * Makes the calling thread one that runs when it is woken and is not pushed aside by those it wakes: a little work
 * between two other threads, which else costs them switches back and forth. Where its priority may not be raised
 * (CAP_SYS_NICE, RLIMIT_NICE) it asks for a longer time slice, which takes no right and no bigger share of the CPU;
 * kernels before 6.12 know no such thing, and nothing changes.
 */
void preferThisThread();

}  // namespace vhostd
