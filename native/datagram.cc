#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "retry.h"
#include "symbols.h"

using vhostd::retried;

/** A datagram socket whose messages go to that path; one that begins with "@" is a name in the abstract namespace (unix(7)). */
int32_t vhostd_connect_datagram(const char* path) {
  sockaddr_un name = {};
  name.sun_family = AF_UNIX;
  size_t length = strlen(path);
  if (length == 0) return -ENOENT;
  if (length >= sizeof name.sun_path) return -ENAMETOOLONG;
  memcpy(name.sun_path, path, length);
  bool isAbstract = path[0] == '@';
  if (isAbstract) name.sun_path[0] = 0;
  // Every byte of an abstract name counts; a path has its end with it.
  socklen_t size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + length + (isAbstract ? 0 : 1));
  int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return -errno;
  int result = retried([&] { return connect(fd, reinterpret_cast<const sockaddr*>(&name), size); });
  if (result >= 0) return fd;
  close(fd);
  return result;
}
