#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <string>

#include "symbols.h"
#include "test/check.h"

namespace {

uint8_t bytes[16];
int32_t fds[253];
int32_t count;

}  // namespace

TEST(fds_travel_253_at_a_time) {
  int32_t pair[2];
  CHECK(vhostd_socket_pair(pair) == 0);
  int32_t many[253];
  int file = vhostd_eventfd();
  for (int32_t& fd : many) fd = file;
  CHECK(vhostd_send(pair[0], bytes, 16, many, 253) == 16);
  CHECK(vhostd_send(pair[0], bytes, 16, many, 254) == -EINVAL);
  CHECK(vhostd_peek(pair[1], bytes, 16) == 16);
  CHECK(vhostd_receive(pair[1], bytes, 8, fds, &count) == 8);
  CHECK(count == 253);
  for (int index = 0; index < count; index++) close(fds[index]);
  CHECK(vhostd_receive(pair[1], bytes, 16, fds, &count) == 8);
  CHECK(count == 0);
  CHECK(vhostd_receive(pair[1], bytes, 16, fds, &count) == -EAGAIN);
  close(pair[0]);
  CHECK(vhostd_is_hung_up(pair[1]) == 1);
  CHECK(vhostd_send(pair[1], bytes, 1, many, 0) == -EPIPE);
  close(pair[1]);
  close(file);
}

TEST(a_look_leaves_bytes_and_fds) {
  int32_t pair[2];
  CHECK(vhostd_socket_pair(pair) == 0);
  int file = vhostd_eventfd();
  CHECK(vhostd_send(pair[0], bytes, 4, &file, 1) == 4);
  CHECK(vhostd_send(pair[0], bytes, 8, nullptr, 0) == 8);
  for (int look = 0; look < 3; look++) {
    CHECK(vhostd_peek_message(pair[1], bytes, 16, fds, &count) == 4);
    CHECK(count == 1);
    close(fds[0]);
  }
  CHECK(vhostd_receive(pair[1], bytes, 4, fds, &count) == 4);
  CHECK(count == 1);
  close(fds[0]);
  CHECK(vhostd_peek_message(pair[1], bytes, 8, fds, &count) == 8);
  CHECK(count == 0);
  // Fds of what comes behind are seen with what has none: one byte more tells.
  CHECK(vhostd_send(pair[0], bytes, 4, &file, 1) == 4);
  CHECK(vhostd_peek_message(pair[1], bytes, 9, fds, &count) == 9);
  CHECK(count == 1);
  close(fds[0]);
  close(pair[0]);
  close(pair[1]);
  close(file);
}

TEST(fds_without_room_are_refused) {
  int32_t pair[2];
  CHECK(vhostd_socket_pair(pair) == 0);
  int file = vhostd_eventfd();
  int32_t many[4] = {file, file, file, file};
  CHECK(vhostd_send(pair[0], bytes, 4, many, 4) == 4);
  rlimit before;
  getrlimit(RLIMIT_NOFILE, &before);
  rlimit tight = before;
  tight.rlim_cur = static_cast<rlim_t>(file) + 3;
  setrlimit(RLIMIT_NOFILE, &tight);
  int64_t result = vhostd_receive(pair[1], bytes, 4, fds, &count);
  setrlimit(RLIMIT_NOFILE, &before);
  CHECK(result == -EMFILE);
  CHECK(count < 4);
  for (int index = 0; index < count; index++) close(fds[index]);
  close(pair[0]);
  close(pair[1]);
  close(file);
}

TEST(unix_paths_are_checked) {
  std::string tooLong(108, 'x');
  CHECK(vhostd_connect_unix(tooLong.c_str()) == -ENAMETOOLONG);
  CHECK(vhostd_listen_unix(tooLong.c_str(), 0600) == -ENAMETOOLONG);
  CHECK(vhostd_connect_unix("/nonexistent/socket") == -ENOENT);
}
