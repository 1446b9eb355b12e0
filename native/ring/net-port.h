#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "net-header.h"

namespace vhostd::ring {

/** A frame with its header, in memory that nobody else writes to while it is looked at. */
struct NetFrame {
  /** `frame` follows it. */
  NetHeader* header = nullptr;
  uint8_t* frame = nullptr;
  /** Of the frame, bytes. */
  size_t length = 0;
};

enum class Sent {
  sent,
  /** Nobody is there, or has room. */
  dropped,
  /** The frame is malformed or was refused. */
  bad,
};

/**
 * The world outside of a network device. All is called inside turns, the worker's or control's, but what says
 * otherwise.
 */
class NetPort {
 public:
  virtual ~NetPort() = default;

  /** Whether frames reach anybody. At any time, by control. */
  virtual bool carrier() const = 0;
  /** Control makes sure that it is what it says: it may have come back. */
  virtual void revive() {}
  /** The operator has plugged it in, or pulled it out. */
  virtual void setLink(bool /*up*/) {}

  virtual std::vector<int> sources() const { return {}; }
  /** On the worker's thread, outside its turns. */
  virtual void signalled(size_t /*source*/, uint32_t /*epollEvents*/) {}

  /** The driver is ready, or goes on. There is no worker. */
  virtual void start(uint64_t features) = 0;
  /** The rings are gone, until the next start. There is no worker. */
  virtual void stop() {}
  /** The rings have failed. On the worker's thread, outside its turns. */
  virtual void hangUp() {}
  /** The driver does not come back. */
  virtual void release() {}
  /** From now on exactly these pairs are in use, ascending. */
  virtual void use(const std::vector<unsigned>& /*pairs*/) {}

  /** Sends what `parts` hold: a header and a frame of `total` bytes together, in a driver's memory. */
  virtual Sent send(unsigned pair, const std::vector<iovec>& parts, size_t total) = 0;
  /** The turn is over: who waits for frames is woken. */
  virtual void flush() {}
  /**
   * The next frame for a pair, where there is one; stays so until `consume`.
   * @param wake where there is none, a source is signalled when there is
   */
  virtual bool peek(unsigned pair, NetFrame& frame, bool wake) = 0;
  virtual void consume(unsigned pair) = 0;
};

/** Where frames go, and who is told that `carrier` may have changed, from any thread. */
struct NetPortOptions {
  /** Name of the interface or the wire. */
  std::string name;
  unsigned pairs;
  std::function<void()> notify;
};

/** Each nullptr with a reason where it cannot be had. */
std::unique_ptr<NetPort> createTapPort(const NetPortOptions& options, std::string& reason);
std::unique_ptr<NetPort> createWirePort(const NetPortOptions& options, std::string& reason);
std::unique_ptr<NetPort> createEchoPort(const NetPortOptions& options, std::string& reason);

}  // namespace vhostd::ring
