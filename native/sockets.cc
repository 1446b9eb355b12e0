#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "retry.h"
#include "symbols.h"

using vhostd::orErrno;
using vhostd::retried;

namespace {

/** The kernel's own limit of fds in one message (SCM_MAX_FD). */
constexpr int MAX_FDS = 253;

/** Connections that wait on a listening socket. */
constexpr int BACKLOG = 128;

int32_t address(const char* path, sockaddr_un* into) {
  size_t length = strlen(path);
  if (length == 0) return -ENOENT;
  if (length >= sizeof into->sun_path) return -ENAMETOOLONG;
  memset(into, 0, sizeof *into);
  into->sun_family = AF_UNIX;
  memcpy(into->sun_path, path, length);
  return 0;
}

int32_t newSocket() { return orErrno(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)); }

int32_t closing(int32_t fd, int32_t error) {
  close(fd);
  return error;
}

/** A socket file that nobody listens on: left by a process that died. */
bool isAbandoned(const char* path) {
  struct stat status;
  if (lstat(path, &status) < 0 || !S_ISSOCK(status.st_mode)) return false;
  int32_t fd = vhostd_connect_unix(path);
  if (fd >= 0) close(fd);
  return fd == -ECONNREFUSED;
}

/** Binds, listens and sets the mode. At no instant is the file more open than `mode`. */
int32_t publish(const sockaddr_un& name, int32_t mode) {
  int32_t fd = newSocket();
  if (fd < 0) return fd;
  // The kernel gives the file the mode of the unbound socket, less the umask; chmod then adds what the umask took.
  if (fchmod(fd, static_cast<mode_t>(mode)) < 0) return closing(fd, -errno);
  if (bind(fd, reinterpret_cast<const sockaddr*>(&name), sizeof name) < 0) return closing(fd, -errno);
  if (chmod(name.sun_path, static_cast<mode_t>(mode)) < 0 || listen(fd, BACKLOG) < 0) {
    int32_t error = -errno;
    unlink(name.sun_path);
    return closing(fd, error);
  }
  return fd;
}

int64_t readMessage(int32_t fd, uint8_t* into, int64_t length, int32_t* fds, int32_t* count, int flags) {
  alignas(cmsghdr) char control[CMSG_SPACE(MAX_FDS * sizeof(int))];
  iovec part = {into, static_cast<size_t>(length)};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  *count = 0;
  ssize_t taken = retried([&] { return recvmsg(fd, &message, flags | MSG_DONTWAIT | MSG_CMSG_CLOEXEC); });
  if (taken < 0) return taken;
  for (cmsghdr* part = CMSG_FIRSTHDR(&message); part != nullptr; part = CMSG_NXTHDR(&message, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    int32_t arrived = static_cast<int32_t>((part->cmsg_len - CMSG_LEN(0)) / sizeof(int));
    memcpy(fds + *count, CMSG_DATA(part), arrived * sizeof(int));
    *count += arrived;
  }
  return message.msg_flags & MSG_CTRUNC ? -EMFILE : taken;
}

}  // namespace

int32_t vhostd_connect_unix(const char* path) {
  sockaddr_un name;
  int32_t fd = address(path, &name);
  if (fd < 0) return fd;
  fd = newSocket();
  if (fd < 0) return fd;
  int result = retried([&] { return connect(fd, reinterpret_cast<const sockaddr*>(&name), sizeof name); });
  return result < 0 ? closing(fd, result) : fd;
}

int32_t vhostd_listen_unix(const char* path, int32_t mode) {
  sockaddr_un name;
  int32_t result = address(path, &name);
  if (result < 0) return result;
  result = publish(name, mode);
  if (result != -EADDRINUSE || !isAbandoned(path)) return result;
  if (unlink(path) < 0 && errno != ENOENT) return -errno;
  return publish(name, mode);
}

int32_t vhostd_listen_again(int32_t fd) { return orErrno(listen(fd, BACKLOG)); }

int32_t vhostd_accept(int32_t fd) {
  return retried([&] { return accept4(fd, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC); });
}

int32_t vhostd_socket_pair(int32_t* pair) {
  return orErrno(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair));
}

int32_t vhostd_peer_credentials(int32_t fd, int32_t* credentials) {
  struct ucred peer;
  socklen_t length = sizeof peer;
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) < 0) return -errno;
  credentials[0] = peer.pid;
  credentials[1] = static_cast<int32_t>(peer.uid);
  credentials[2] = static_cast<int32_t>(peer.gid);
  return 0;
}

/** 1 when the peer sends nothing more. What it sent before may still wait to be read. */
int32_t vhostd_is_hung_up(int32_t fd) {
  pollfd state = {fd, POLLRDHUP, 0};
  int result = retried([&] { return poll(&state, 1, 0); });
  return result < 0 ? result : state.revents != 0;
}

/** 1 for a socket of the kind that this module makes. Others may wait for a lock that a peer can hold. */
int32_t vhostd_is_unix_stream(int32_t fd) {
  int domain = 0;
  int type = 0;
  socklen_t length = sizeof domain;
  if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) < 0) return -errno;
  if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &length) < 0) return -errno;
  return domain == AF_UNIX && type == SOCK_STREAM;
}

/** The peer reads the end of the stream, and nobody connects any more, before the fd is closed. */
int32_t vhostd_shutdown(int32_t fd) { return shutdown(fd, SHUT_RDWR) < 0 ? -errno : 0; }

/** Bytes that wait to be read. */
int64_t vhostd_unread(int32_t fd) {
  int count = 0;
  return ioctl(fd, FIONREAD, &count) < 0 ? -errno : count;
}

int64_t vhostd_peek(int32_t fd, uint8_t* into, int64_t length) {
  return retried([&] { return recv(fd, into, static_cast<size_t>(length), MSG_PEEK | MSG_DONTWAIT); });
}

/**
 * Takes up to `length` bytes, and the fds that came with them: fds[0..*count), room for 253.
 * -EMFILE: fds were sent that this process could not take; those that did arrive are the caller's all the same.
 */
int64_t vhostd_receive(int32_t fd, uint8_t* into, int64_t length, int32_t* fds, int32_t* count) {
  return readMessage(fd, into, length, fds, count, 0);
}

/**
 * As vhostd_receive, and leaves everything in the socket: the fds are duplicates. What is seen ends behind bytes that came
 * with fds. The fds may be those of bytes behind `length`: the kernel looks for some to the end of what has arrived.
 */
int64_t vhostd_peek_message(int32_t fd, uint8_t* into, int64_t length, int32_t* fds, int32_t* count) {
  return readMessage(fd, into, length, fds, count, MSG_PEEK);
}

/** Sends what the socket takes, at least one byte or -EAGAIN. The fds go with the first byte. */
int64_t vhostd_send(int32_t fd, const uint8_t* from, int64_t length, const int32_t* fds, int32_t count) {
  if (count < 0 || count > MAX_FDS) return -EINVAL;
  alignas(cmsghdr) char control[CMSG_SPACE(MAX_FDS * sizeof(int))] = {};
  iovec part = {const_cast<uint8_t*>(from), static_cast<size_t>(length)};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (count > 0) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(count * sizeof(int));
    cmsghdr* rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(count * sizeof(int));
    memcpy(CMSG_DATA(rights), fds, count * sizeof(int));
  }
  return retried([&] { return sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL); });
}
