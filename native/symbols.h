#pragma once

#include <stdint.h>

/**
 * The C face of the module: every function that bun:ffi links, once. All return a value >= 0 or -errno (errno itself
 * does not survive the way back: the engine makes system calls of its own). None keeps a pointer, and none
 * blocks but vhostd_wait_for_closes, for as long as it is told.
 * Arguments are checked in TypeScript.
 */
#define VHOSTD_SYMBOLS(X)                                                                                     \
  X(vhostd_close, int32_t, (int32_t fd))                                                                      \
  X(vhostd_new_lane, int64_t, ())                                                                             \
  X(vhostd_close_later, int32_t, (int64_t lane, int32_t fd))                                                  \
  X(vhostd_pending_closes, int64_t, (int64_t lane))                                                           \
  X(vhostd_wait_for_closes, int32_t, (int32_t milliseconds))                                                  \
  X(vhostd_dup, int32_t, (int32_t fd))                                                                        \
  X(vhostd_compare_files, int32_t, (int32_t one, int32_t other))                                              \
  X(vhostd_lock, int32_t, (int32_t fd))                                                                       \
  X(vhostd_eventfd, int32_t, ())                                                                              \
  X(vhostd_signal_eventfd, int32_t, (int32_t fd))                                                             \
  X(vhostd_drain_eventfd, int64_t, (int32_t fd))                                                              \
  X(vhostd_memfd, int32_t, (const char* name, int64_t size))                                                  \
  X(vhostd_seal_size, int32_t, (int32_t fd))                                                                  \
  X(vhostd_open, int32_t, (const char* path, int32_t writable))                                               \
  X(vhostd_truncate, int32_t, (int32_t fd, int64_t size))                                                     \
  X(vhostd_pread, int64_t, (int32_t fd, uint8_t* into, int64_t length, int64_t offset))                       \
  X(vhostd_pwrite, int64_t, (int32_t fd, const uint8_t* from, int64_t length, int64_t offset))                \
  X(vhostd_file_info, int32_t, (int32_t fd, int64_t* info))                                                   \
  X(vhostd_ioctl, int32_t, (int32_t fd, int64_t request, uint8_t* argument))                                  \
  X(vhostd_raise_open_file_limit, int64_t, ())                                                                \
  X(vhostd_connect_unix, int32_t, (const char* path))                                                         \
  X(vhostd_connect_datagram, int32_t, (const char* path))                                                     \
  X(vhostd_listen_unix, int32_t, (const char* path, int32_t mode))                                            \
  X(vhostd_listen_again, int32_t, (int32_t fd))                                                               \
  X(vhostd_accept, int32_t, (int32_t fd))                                                                     \
  X(vhostd_socket_pair, int32_t, (int32_t* pair))                                                             \
  X(vhostd_peer_credentials, int32_t, (int32_t fd, int32_t* credentials))                                     \
  X(vhostd_is_hung_up, int32_t, (int32_t fd))                                                                 \
  X(vhostd_is_unix_stream, int32_t, (int32_t fd))                                                             \
  X(vhostd_shutdown, int32_t, (int32_t fd))                                                                   \
  X(vhostd_unread, int64_t, (int32_t fd))                                                                     \
  X(vhostd_peek, int64_t, (int32_t fd, uint8_t* into, int64_t length))                                        \
  X(vhostd_receive, int64_t, (int32_t fd, uint8_t* into, int64_t length, int32_t* fds, int32_t* count))       \
  X(vhostd_peek_message, int64_t, (int32_t fd, uint8_t* into, int64_t length, int32_t* fds, int32_t* count))  \
  X(vhostd_send, int64_t, (int32_t fd, const uint8_t* from, int64_t length, const int32_t* fds, int32_t count)) \
  X(vhostd_map, int64_t, (int32_t fd, int64_t offset, int64_t size, int32_t writable))                        \
  X(vhostd_unmap, int32_t, (int64_t address, int64_t size))                                                   \
  X(vhostd_disown, int32_t, (int64_t address, int64_t size))                                                  \
  X(vhostd_read8, int64_t, (int64_t address))                                                                 \
  X(vhostd_read16, int64_t, (int64_t address))                                                                \
  X(vhostd_read32, int64_t, (int64_t address))                                                                \
  X(vhostd_write8, int32_t, (int64_t address, uint32_t value))                                                \
  X(vhostd_write16, int32_t, (int64_t address, uint32_t value))                                               \
  X(vhostd_write32, int32_t, (int64_t address, uint32_t value))                                               \
  X(vhostd_log_mark, int32_t, (int64_t log, int64_t first, int64_t count))                                    \
  X(vhostd_log_merge_bitmap, int32_t, (int64_t log, const uint8_t* from, int64_t length))                     \
  X(vhostd_log_merge_bytemap, int32_t, (int64_t log, int64_t first, const uint8_t* from, int64_t count))      \
  X(vhostd_log_take_bytemap, int32_t, (int64_t log, int64_t first, int64_t map, int64_t count))               \
  X(vhostd_log_count, int64_t, (int64_t log, int64_t length))

#define VHOSTD_DECLARE(name, result, arguments) extern "C" result name arguments;
VHOSTD_SYMBOLS(VHOSTD_DECLARE)
#undef VHOSTD_DECLARE
