#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include <sys/uio.h>

#include "chain.h"

namespace vhostd::ring {

using Parameter = std::variant<bool, int64_t, std::string>;
using Parameters = std::map<std::string, Parameter>;

/** A chain that control serves. */
struct ForwardedRequest {
  /** Never used twice. */
  uint64_t id;
  uint16_t queue;
  /** A copy of its readable buffers. */
  std::vector<uint8_t> readable;
  /** Room in its writable buffers, bytes. */
  uint64_t writable;
};

/**
 * What a backend may do while the worker calls it. All of it on the worker's thread, inside its turn at the gate.
 */
class ServiceContext {
 public:
  /**
   * Up to `length` bytes of the chain's buffers from `skip` on, as places in this process: valid until the next call of
   * `giveWay` or `blocking`. Fewer bytes than asked where the buffers need more than 1024 parts. nullptr where a byte
   * of it is not mapped for that direction.
   */
  virtual const std::vector<iovec>* vectors(const Chain& chain, Direction direction, uint64_t skip, uint64_t length) = 0;
  /** Copies out of the readable buffers. False where there are fewer, they are not mapped or their memory is gone. */
  virtual bool copyFrom(const Chain& chain, uint64_t skip, void* to, size_t length) = 0;
  /** Copies into the writable buffers. False where there are fewer, they are not mapped or their memory is gone. */
  virtual bool copyTo(const Chain& chain, uint64_t skip, const void* from, size_t length) = 0;

  /**
   * For queues that the backend pulls: the next chain, which it completes or puts back before it returns. nullptr where
   * there is none, or none may be taken now.
   */
  virtual Chain* pull(uint16_t queue) = 0;
  /** Of the chains that were pulled and not completed the last one, while none was completed since. */
  virtual void putBack(Chain* chain) = 0;
  /** Whether `pull` may find one. Where not, the worker is woken when that changes. */
  virtual bool stocked(uint16_t queue) const = 0;
  /** Looks at a queue again that had too few chains. */
  virtual void restock(uint16_t queue) = 0;
  virtual bool active(uint16_t queue) const = 0;
  /** There will be another turn soon, notified or not. */
  virtual bool polling() const = 0;
  /** The turn should end soon: someone else wants it, or there will be no other. */
  virtual bool pressed() const = 0;

  /**
   * Gives the chain back to the driver and ends its life.
   * @param written bytes from the start of its writable buffers
   * @param bytes of data that were moved, for the counters
   */
  virtual void complete(Chain* chain, uint32_t written, uint64_t bytes, bool error) = 0;
  /** Ends the chain's life without giving it back: the function is being stopped. */
  virtual void abandon(Chain* chain) = 0;
  /** Control shall ask for `takeRequests`. */
  virtual void callControl() = 0;
  /** The function needs a reset; nothing is served any more. */
  virtual void fail(std::string reason) = 0;

  /** To be called between bounded pieces of work. False where the work should be abandoned. */
  virtual bool giveWay() = 0;
  /** Runs something slow that touches no guest memory, with the gate open. */
  virtual void blocking(const std::function<void()>& work) = 0;

 protected:
  ~ServiceContext() = default;
};

/** Serves the requests of one device class. */
class RingBackend {
 public:
  virtual ~RingBackend() = default;

  /** Sets one parameter. Empty, or why it is refused. Called inside control's turn. */
  virtual std::string set(const std::string& name, const Parameter& value) = 0;
  /** What the parameters lack before the first start; empty where nothing. */
  virtual std::string missing() const = 0;
  /**
   * Once, when the parameters are complete. Empty, or why it is refused.
   * @param notify makes control look at `carrier`, from any thread
   */
  virtual std::string open(std::function<void()> /*notify*/) { return {}; }
  /** The driver is ready (DRIVER_OK), or goes on. There is no worker. */
  virtual void start(uint64_t features) = 0;
  /** Owns the chain until it has called `complete` or `abandon`, now or later. */
  virtual void serve(Chain* chain, ServiceContext& context) = 0;

  /** For backends that keep chains: when to call `resume`, CLOCK_MONOTONIC ns; -1 for never. */
  virtual int64_t due() const { return -1; }
  /** Serves what is due at `now`. */
  virtual void resume(int64_t /*now*/, ServiceContext& /*context*/) {}
  /** Serves all that is kept, without waiting. */
  virtual void drain(ServiceContext& /*context*/) {}
  /** Forgets all that is kept; the chains are dead. Called while there is no worker. */
  virtual void drop() {}

  /** For backends that take chains themselves: `serve` gets none of such a queue. */
  virtual bool pulls(uint16_t /*queue*/) const { return false; }
  /** For backends that wait for other files than notifications, edge-triggered: by index; -1 for none. Inside turns. */
  virtual std::vector<int> sources() const { return {}; }
  /** Something came from a source. On the worker's thread, outside its turns. */
  virtual void signalled(size_t /*source*/, uint32_t /*epollEvents*/) {}
  /** Once in each turn: a bounded piece of what comes from there. True where there is more that can be done now. */
  virtual bool poll(ServiceContext& /*context*/) { return false; }
  /**
   * How many turns without work the worker makes before it has itself notified and sleeps: for work that comes in a
   * stream, where that costs more than to look again. It lets others run in between.
   */
  virtual unsigned patience() const { return 0; }
  /** Rings were activated. Inside control's turn. */
  virtual void ringsChanged() {}
  /** The worker ends because the rings have failed. On its thread, outside its turns. */
  virtual void broken() {}
  /** All memory was unmapped: whoever had the function has left it. Inside control's turn. */
  virtual void released() {}
  /** Whether the world outside can be reached. By control at any time. */
  virtual bool carrier() const { return true; }
  /** Facts that the driver or the world outside have made, by name. By control at any time. */
  virtual std::map<std::string, int64_t> info() const { return {}; }

  /** For backends that let control serve. By control at any time, outside its turns too: what was not yet taken. */
  virtual std::vector<ForwardedRequest> takeRequests() { return {}; }
  /** By control at any time. True where the request was there; the worker is to be woken then. */
  virtual bool answer(uint64_t /*id*/, std::vector<uint8_t> /*bytes*/) { return false; }
};

/** CLOCK_MONOTONIC, ns. */
int64_t monotonicNow();

/** A backend by name, or nullptr. */
std::unique_ptr<RingBackend> createBackend(const std::string& name);

/** One for each class that has a worker. */
std::unique_ptr<RingBackend> createBlkBackend();
std::unique_ptr<RingBackend> createNetBackend();
/** Has no class: control serves. */
std::unique_ptr<RingBackend> createForwardBackend();

}  // namespace vhostd::ring
