#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <utility>

#include "backend.h"
#include "net-port.h"

namespace vhostd::ring {
namespace {

constexpr int64_t kMostPairs = 256;
/** Of one receive queue in one turn. */
constexpr int kBatch = 64;
constexpr size_t kBatchBytes = 1 << 18;
/** Some tens of microseconds. */
constexpr unsigned kPatience = 50;
/** How long a frame waits for the rest of the chains that it needs: a driver may never make that many available. */
constexpr int64_t kShortWait = 5'000'000;
/** An Ethernet header with a VLAN tag is no part of the MTU. */
constexpr size_t kOutsideMtu = 18;

/** Commands of the control queue (VIRTIO 1.2, 5.1.6.5). */
enum Class : uint8_t { kRx = 0, kMq = 4 };
enum Command : uint8_t { kRxPromisc = 0, kRxAllMulti = 1, kMqPairsSet = 0 };
enum Ack : uint8_t { kOk = 0, kError = 1 };

/**
 * A network device. Pair k is receive queue 2k and transmit queue 2k + 1; the queue behind the last pair is the control
 * queue. A receive chain is taken when there is a frame for it.
 *
 * | parameter | |
 * |---|---|
 * | backend | "tap", "wire" or "echo"; at creation |
 * | tap, wire | name of the interface, of the wire; at creation |
 * | pairs | queue pairs; at creation |
 * | mac | text, or a number whose lowest byte is the first |
 * | mtu | 0 for none |
 * | link | the operator's wish; true brings an interface back that was made again |
 * | promiscuous | as the driver's command; frames for others pass |
 * | pairsInUse | as the driver's command; 0: those both of whose queues are active |
 */
class NetBackend final : public RingBackend {
 public:
  std::string set(const std::string& name, const Parameter& value) override;
  std::string missing() const override;
  std::string open(std::function<void()> notify) override;
  void start(uint64_t features) override;
  void serve(Chain* chain, ServiceContext& context) override;
  int64_t due() const override { return due_; }
  void resume(int64_t now, ServiceContext& context) override;
  void drop() override;

  bool pulls(uint16_t queue) const override { return queue % 2 == 0 && queue < 2 * usablePairs(); }
  std::vector<int> sources() const override { return port_ ? port_->sources() : std::vector<int>(); }
  void signalled(size_t source, uint32_t epollEvents) override { port_->signalled(source, epollEvents); }
  bool poll(ServiceContext& context) override;
  unsigned patience() const override { return kPatience; }
  void ringsChanged() override { pairsChanged_ = true; }
  void broken() override { port_->hangUp(); }
  void released() override { port_->release(); }
  bool carrier() const override { return port_->carrier(); }
  std::map<std::string, int64_t> info() const override;

 private:
  /** A receive queue's part of a frame. */
  struct Place {
    Chain* chain;
    size_t bytes;
  };
  enum class Delivery {
    done,
    /** Until there are more chains, or for some time. */
    waits,
    /** A malformed chain was in the way and is gone. */
    again,
  };

  std::string setNumber(const std::string& name, int64_t number);
  std::string setFlag(const std::string& name, bool flag);
  std::string setText(const std::string& name, const std::string& text);
  /** Without MQ there is one pair, whatever the device has (5.1.2). */
  unsigned usablePairs() const { return hasFeature(features_, net_feature::mq) ? pairs_ : 1; }
  void choosePairs(ServiceContext& context);
  void transmit(Chain* chain, ServiceContext& context);
  Sent send(const Chain& chain, ServiceContext& context);
  bool receive(unsigned pair, ServiceContext& context);
  bool isWanted(const NetFrame& frame) const;
  Delivery deliver(unsigned pair, const NetFrame& frame, ServiceContext& context);
  Delivery gather(uint16_t queue, size_t total, ServiceContext& context);
  void fill(const NetFrame& frame, ServiceContext& context);
  void control(Chain* chain, ServiceContext& context);
  Ack execute(const uint8_t* command, size_t length);
  void countDropped() { dropped_.fetch_add(1, std::memory_order_relaxed); }

  std::string backend_;
  std::string tap_;
  std::string wire_;
  unsigned pairs_ = 0;
  uint8_t mac_[kMacBytes] = {};
  size_t mtu_ = 0;
  bool link_ = true;
  std::atomic<bool> promiscuous_{false};
  std::atomic<unsigned> pairsInUse_{1};
  /** Frames that nobody had room for. */
  std::atomic<uint64_t> dropped_{0};

  std::unique_ptr<NetPort> port_;
  uint64_t features_ = 0;
  bool pairsChanged_ = true;
  /** In use; ascending. */
  std::vector<unsigned> used_;
  std::vector<Place> places_;
  /** By pair: until when its frame waits for more chains; 0 where it does not. The earliest of them, or -1. */
  std::vector<int64_t> waitsUntil_;
  int64_t due_ = -1;
};

std::string NetBackend::set(const std::string& name, const Parameter& value) {
  if (const auto* number = std::get_if<int64_t>(&value)) return setNumber(name, *number);
  if (const auto* flag = std::get_if<bool>(&value)) return setFlag(name, *flag);
  return setText(name, std::get<std::string>(value));
}

std::string NetBackend::setNumber(const std::string& name, int64_t number) {
  const auto within = [&](int64_t least, int64_t most) -> std::string {
    if (number >= least && number <= most) return {};
    return "is " + std::to_string(number) + ", must be from " + std::to_string(least) + " to " + std::to_string(most);
  };
  std::string reason;
  if (name == "pairs") {
    if (port_) return "cannot be changed";
    reason = within(1, kMostPairs);
    if (reason.empty()) pairs_ = static_cast<unsigned>(number);
  } else if (name == "pairsInUse") {
    reason = within(0, pairs_ == 0 ? kMostPairs : pairs_);
    if (reason.empty()) pairsInUse_ = static_cast<unsigned>(number);
    pairsChanged_ = true;
  } else if (name == "mac") {
    for (size_t byte = 0; byte < kMacBytes; byte++) mac_[byte] = static_cast<uint8_t>(number >> 8 * byte);
  } else if (name == "mtu") {
    reason = within(0, 65535);
    if (reason.empty()) mtu_ = static_cast<size_t>(number);
  } else {
    return "no number";
  }
  return reason;
}

std::string NetBackend::setFlag(const std::string& name, bool flag) {
  if (name == "promiscuous") {
    promiscuous_ = flag;
  } else if (name == "link") {
    link_ = flag;
    if (!port_) return {};
    if (flag) port_->revive();
    port_->setLink(flag);
    pairsChanged_ = true;
  } else {
    return "no boolean";
  }
  return {};
}

std::string NetBackend::setText(const std::string& name, const std::string& text) {
  if (name == "mac") {
    unsigned bytes[kMacBytes];
    int end = 0;
    if (sscanf(text.c_str(), "%2x:%2x:%2x:%2x:%2x:%2x%n", &bytes[0], &bytes[1], &bytes[2], &bytes[3], &bytes[4], &bytes[5],
               &end) != 6 ||
        text.size() != static_cast<size_t>(end) || end != 17) {
      return "\"" + text + "\" is no MAC address like 02:00:00:00:00:01";
    }
    std::copy(bytes, bytes + kMacBytes, mac_);
    return {};
  }
  if (port_) return "cannot be changed";
  if (name == "backend") {
    if (text != "tap" && text != "wire" && text != "echo") return "\"" + text + "\" is none of tap, wire, echo";
    backend_ = text;
  } else if (name == "tap") {
    tap_ = text;
  } else if (name == "wire") {
    wire_ = text;
  } else {
    return "no text";
  }
  return {};
}

std::string NetBackend::missing() const {
  if (backend_.empty()) return "backend";
  if (pairs_ == 0) return "pairs";
  if (backend_ == "tap" && tap_.empty()) return "tap";
  if (backend_ == "wire" && wire_.empty()) return "wire";
  return {};
}

std::string NetBackend::open(std::function<void()> notify) {
  std::string reason;
  const auto create = backend_ == "tap" ? createTapPort : backend_ == "wire" ? createWirePort : createEchoPort;
  port_ = create({backend_ == "tap" ? tap_ : wire_, pairs_, std::move(notify)}, reason);
  if (port_) port_->setLink(link_);
  waitsUntil_.assign(pairs_, 0);
  return reason;
}

void NetBackend::start(uint64_t features) {
  features_ = features;
  pairsChanged_ = true;
  port_->start(features);
}

/** The rings are gone. What the driver has said by commands stays until control says otherwise. */
void NetBackend::drop() {
  // Not where it could not be had.
  if (port_) port_->stop();
  used_.clear();
  std::fill(waitsUntil_.begin(), waitsUntil_.end(), 0);
  due_ = -1;
}

std::map<std::string, int64_t> NetBackend::info() const {
  return {{"promiscuous", promiscuous_ ? 1 : 0},
          {"pairsInUse", pairsInUse_.load()},
          {"dropped", static_cast<int64_t>(dropped_.load(std::memory_order_relaxed))}};
}

void NetBackend::choosePairs(ServiceContext& context) {
  if (!pairsChanged_) return;
  pairsChanged_ = false;
  const unsigned count = pairsInUse_;
  used_.clear();
  for (unsigned pair = 0; pair < usablePairs(); pair++) {
    const uint16_t queue = static_cast<uint16_t>(2 * pair);
    if ((count == 0 || pair < count) && context.active(queue) && context.active(queue + 1)) used_.push_back(pair);
  }
  port_->use(used_);
  // What waited may not be there any more.
  for (unsigned pair = 0; pair < pairs_; pair++) {
    if (std::exchange(waitsUntil_[pair], 0) != 0) context.restock(static_cast<uint16_t>(2 * pair));
  }
}

void NetBackend::serve(Chain* chain, ServiceContext& context) {
  choosePairs(context);
  if (chain->queue == 2 * usablePairs()) return control(chain, context);
  transmit(chain, context);
}

void NetBackend::transmit(Chain* chain, ServiceContext& context) {
  const uint64_t bytes = chain->readableSize - std::min<uint64_t>(chain->readableSize, sizeof(NetHeader));
  const Sent sent = send(*chain, context);
  if (sent == Sent::dropped) countDropped();
  context.complete(chain, 0, sent == Sent::sent ? bytes : 0, sent == Sent::bad);
}

Sent NetBackend::send(const Chain& chain, ServiceContext& context) {
  constexpr uint64_t least = sizeof(NetHeader) + kLeastFrame;
  constexpr uint64_t most = sizeof(NetHeader) + kMostFrame;
  const uint64_t total = chain.readableSize;
  if (chain.queue % 2 == 0 || chain.misordered || total < least || total > most) return Sent::bad;
  if (!link_) return Sent::dropped;
  const std::vector<iovec>* parts = context.vectors(chain, Direction::readable, 0, total);
  if (parts == nullptr) return Sent::bad;
  size_t reachable = 0;
  for (const iovec& part : *parts) reachable += part.iov_len;
  // It is in more parts than the system takes at a time.
  if (reachable != total) return Sent::bad;
  unsigned pair = chain.queue / 2u;
  if (!used_.empty() && !std::binary_search(used_.begin(), used_.end(), pair)) pair = used_[pair % used_.size()];
  return port_->send(pair, *parts, total);
}

bool NetBackend::poll(ServiceContext& context) {
  choosePairs(context);
  bool more = false;
  for (const unsigned pair : used_) more |= receive(pair, context);
  port_->flush();
  return more;
}

/** A bounded batch. True where there may be more. */
bool NetBackend::receive(unsigned pair, ServiceContext& context) {
  const uint16_t queue = static_cast<uint16_t>(2 * pair);
  size_t bytes = 0;
  for (int count = 0; count < kBatch && bytes < kBatchBytes; count++) {
    if (context.pressed()) return true;
    // Without a link frames are taken and get lost; else they wait for chains where they are.
    if (link_ && !context.stocked(queue)) return false;
    NetFrame frame;
    if (!port_->peek(pair, frame, !context.polling())) return false;
    if (isWanted(frame)) {
      const Delivery delivery = deliver(pair, frame, context);
      if (delivery == Delivery::waits) return false;
      // A driver that replaces malformed chains as fast as it gets them back does not keep the turn.
      if (delivery == Delivery::again) continue;
      bytes += frame.length;
    }
    waitsUntil_[pair] = 0;
    port_->consume(pair);
  }
  return true;
}

/** Whether the frame passes the driver's filter (5.1.6.5.1). */
bool NetBackend::isWanted(const NetFrame& frame) const {
  constexpr uint8_t kGroup = 1;
  const bool filtered = hasFeature(features_, net_feature::ctrlRx) && !promiscuous_.load(std::memory_order_relaxed);
  return !filtered || (frame.frame[0] & kGroup) != 0 || memcmp(frame.frame, mac_, kMacBytes) == 0;
}

NetBackend::Delivery NetBackend::deliver(unsigned pair, const NetFrame& frame, ServiceContext& context) {
  const bool tooLong = hasFeature(features_, net_feature::mtu) && mtu_ != 0 && frame.header->gsoType == 0 &&
                       frame.length > mtu_ + kOutsideMtu;
  if (!link_ || tooLong || !prepareForDriver(*frame.header, frame.frame, frame.length, features_)) {
    countDropped();
    return Delivery::done;
  }
  const uint16_t queue = static_cast<uint16_t>(2 * pair);
  const Delivery gathered = gather(queue, sizeof(NetHeader) + frame.length, context);
  if (gathered == Delivery::done) fill(frame, context);
  if (gathered != Delivery::waits) return gathered;
  const bool mergeable = hasFeature(features_, net_feature::mrgRxbuf);
  const bool partly = !places_.empty();
  for (; !places_.empty(); places_.pop_back()) context.putBack(places_.back().chain);
  if (!partly) return Delivery::waits;
  if (!mergeable) {
    countDropped();
    return Delivery::done;
  }
  // The driver notifies when it has made more available, if it does.
  if (waitsUntil_[pair] == 0) {
    waitsUntil_[pair] = monotonicNow() + kShortWait;
    if (due_ < 0) due_ = waitsUntil_[pair];
  }
  return Delivery::waits;
}

/** Fills `places_` with room for `total` bytes. `waits` where there is too little; they are to be put back then. */
NetBackend::Delivery NetBackend::gather(uint16_t queue, size_t total, ServiceContext& context) {
  const bool mergeable = hasFeature(features_, net_feature::mrgRxbuf);
  places_.clear();
  for (size_t found = 0; found < total;) {
    Chain* chain = context.pull(queue);
    if (chain == nullptr) return Delivery::waits;
    if (chain->writableSize < sizeof(NetHeader) || chain->misordered || chain->readableSize != 0) {
      // In the order that they were taken; what is before it is as good as lost, too.
      for (const Place& place : places_) context.complete(place.chain, 0, 0, true);
      places_.clear();
      context.complete(chain, 0, 0, true);
      return Delivery::again;
    }
    const size_t bytes = std::min<uint64_t>(total - found, chain->writableSize);
    places_.push_back({chain, bytes});
    found += bytes;
    if (found < total && !mergeable) return Delivery::waits;
  }
  return Delivery::done;
}

/** Copies the frame to `places_` and gives them back, whether that goes well or not. */
void NetBackend::fill(const NetFrame& frame, ServiceContext& context) {
  frame.header->buffers = static_cast<uint16_t>(places_.size());
  const uint8_t* from = reinterpret_cast<const uint8_t*>(frame.header);
  bool good = true;
  for (const Place& place : places_) {
    good = good && context.copyTo(*place.chain, 0, from, place.bytes);
    from += place.bytes;
  }
  size_t header = sizeof(NetHeader);
  for (const Place& place : places_) {
    context.complete(place.chain, good ? static_cast<uint32_t>(place.bytes) : 0, good ? place.bytes - header : 0, !good);
    header = 0;
  }
  places_.clear();
}

/** Frames that have waited long enough get lost. */
void NetBackend::resume(int64_t now, ServiceContext& context) {
  due_ = -1;
  for (unsigned pair = 0; pair < waitsUntil_.size(); pair++) {
    int64_t& until = waitsUntil_[pair];
    if (until != 0 && until <= now) {
      until = 0;
      countDropped();
      port_->consume(pair);
      context.restock(static_cast<uint16_t>(2 * pair));
    } else if (until != 0 && (due_ < 0 || until < due_)) {
      due_ = until;
    }
  }
}

void NetBackend::control(Chain* chain, ServiceContext& context) {
  // The class, the command and two bytes: all of what is served.
  uint8_t command[4];
  const size_t length = std::min<uint64_t>(chain->readableSize, sizeof command);
  Ack ack = kError;
  if (!chain->misordered && context.copyFrom(*chain, 0, command, length)) ack = execute(command, length);
  const bool answered = chain->writableSize >= 1 && context.copyTo(*chain, 0, &ack, 1);
  context.complete(chain, answered ? 1 : 0, 0, !answered || ack != kOk);
}

Ack NetBackend::execute(const uint8_t* command, size_t length) {
  if (length < 3) return kError;
  if (command[0] == kRx && hasFeature(features_, net_feature::ctrlRx) && command[2] <= 1) {
    if (command[1] == kRxPromisc) promiscuous_ = command[2] == 1;
    // All groups pass anyway.
    return command[1] == kRxPromisc || command[1] == kRxAllMulti ? kOk : kError;
  }
  if (command[0] == kMq && command[1] == kMqPairsSet && length == 4 && hasFeature(features_, net_feature::mq)) {
    const unsigned count = command[2] | command[3] << 8;
    if (count < 1 || count > pairs_) return kError;
    pairsInUse_ = count;
    pairsChanged_ = true;
    return kOk;
  }
  return kError;
}

}  // namespace

std::unique_ptr<RingBackend> createNetBackend() {
  return std::make_unique<NetBackend>();
}

}  // namespace vhostd::ring
