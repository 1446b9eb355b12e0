#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "symbols.h"
#include "test/check.h"

namespace {

uint8_t bytes[16];
int32_t fds[253];
int32_t count;

/** A receiver in the abstract namespace; `address` is what senders call it. */
int receiver(char* address) {
  sockaddr_un name = {};
  name.sun_family = AF_UNIX;
  int length = snprintf(address, sizeof name.sun_path, "@vhostd-test-%d", getpid());
  memcpy(name.sun_path + 1, address + 1, static_cast<size_t>(length) - 1);
  int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  socklen_t size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path)) + static_cast<socklen_t>(length);
  CHECK(bind(fd, reinterpret_cast<const sockaddr*>(&name), size) == 0);
  return fd;
}

}  // namespace

TEST(a_datagram_is_sent_whole_with_its_fds_or_not_at_all) {
  char address[sizeof(sockaddr_un::sun_path)];
  int far = receiver(address);
  int32_t near = vhostd_connect_datagram(address);
  CHECK(near >= 0);
  int32_t file = vhostd_eventfd();
  CHECK(vhostd_send(near, bytes, 16, &file, 1) == 16);
  CHECK(vhostd_send(near, bytes, 3, &file, 0) == 3);
  CHECK(vhostd_receive(far, bytes, 16, fds, &count) == 16);
  CHECK(count == 1);
  CHECK(vhostd_compare_files(fds[0], file) == 0);
  close(fds[0]);
  CHECK(vhostd_receive(far, bytes, 16, fds, &count) == 3);
  CHECK(count == 0);
  int64_t result = 1;
  for (int sent = 0; sent < 1'000'000 && result > 0; sent++) result = vhostd_send(near, bytes, 1, &file, 0);
  CHECK(result == -EAGAIN);
  close(far);
  CHECK(vhostd_send(near, bytes, 1, &file, 0) == -ECONNREFUSED);
  CHECK(vhostd_connect_datagram(address) == -ECONNREFUSED);
  CHECK(vhostd_connect_datagram("/nowhere/notify") == -ENOENT);
  CHECK(vhostd_connect_datagram("") == -ENOENT);
  char path[sizeof(sockaddr_un::sun_path) + 1];
  memset(path, 'x', sizeof path);
  path[sizeof path - 1] = 0;
  CHECK(vhostd_connect_datagram(path) == -ENAMETOOLONG);
  close(near);
  close(file);
}

TEST(open_files_are_compared_and_not_their_fds) {
  int32_t one = vhostd_eventfd();
  int32_t other = vhostd_eventfd();
  int32_t again = vhostd_dup(one);
  CHECK(vhostd_compare_files(one, again) == 0);
  int32_t order = vhostd_compare_files(one, other);
  CHECK(order == 1 || order == 2);
  CHECK(vhostd_compare_files(other, again) == 3 - order);
  close(again);
  close(other);
  close(one);
  CHECK(vhostd_compare_files(one, one) == -EBADF);
}
