#include <cstring>

#include "test/check.h"
#include "test/ring-rig.h"

using namespace vhostd::ring;

namespace {

constexpr size_t kText = 1 << 20;
constexpr size_t kRoom = kText + 4096;

/** A chain of `length` readable bytes and room for as many. */
void send(Rig& rig, uint16_t head, uint32_t length) {
  for (uint32_t at = 0; at < length; at++) rig.memory[kText + at] = static_cast<uint8_t>(head + at);
  rig.describe(head, kIova + kText, length, 1, head + 1);
  rig.describe(head + 1, kIova + kRoom, length, 2, 0);
  rig.offer(head);
}

ForwardedRequest receive(Rig& rig) {
  std::vector<ForwardedRequest> requests;
  CHECK(check::eventually([&] { return !(requests = rig.function->takeRequests()).empty(); }));
  CHECK(requests.size() == 1);
  return requests.empty() ? ForwardedRequest{} : std::move(requests[0]);
}

TEST(ring_forwarded_request_is_answered_when_control_likes) {
  Rig rig({}, "forward");
  rig.start();
  send(rig, 4, 100);
  pollfd ready = {rig.function->events(), POLLIN, 0};
  CHECK(poll(&ready, 1, 10000) == 1);
  const ForwardedRequest first = receive(rig);
  CHECK(first.queue == 0 && first.writable == 100 && first.readable.size() == 100);
  CHECK(first.readable[0] == 4 && first.readable[99] == 103);
  send(rig, 8, 100);
  const ForwardedRequest second = receive(rig);
  CHECK(rig.function->inFlight() == 2 && rig.used() == 0);
  rig.function->answer(second.id, {7, 8, 9});
  CHECK(rig.awaitUsed(1));
  CHECK(rig.usedElement(0) == std::make_pair(8u, 3u));
  CHECK(memcmp(rig.memory + kRoom, "\x07\x08\x09", 4) == 0);
  rig.function->answer(second.id, {1});
  rig.function->answer(12345, {1});
  // More than there is room for.
  rig.function->answer(first.id, std::vector<uint8_t>(200, 5));
  CHECK(rig.awaitUsed(2));
  CHECK(rig.usedElement(1) == std::make_pair(4u, 100u));
  CHECK(rig.memory[kRoom + 99] == 5 && rig.memory[kRoom + 100] == 0);
  CHECK(rig.function->inFlight() == 0 && rig.function->failure().empty());
  CHECK(rig.function->takeRequests().empty());
  // Both were under way at once.
  std::map<std::string, int64_t> info = rig.function->info();
  CHECK(info["requests"] == 2);
  CHECK(info["busyMicroseconds"] > 0 && info["busyMicroseconds"] < info["microseconds"]);
}

TEST(ring_forwarded_request_outlives_a_park_and_no_stop) {
  Rig rig({}, "forward");
  rig.start();
  send(rig, 4, 8);
  const ForwardedRequest parked = receive(rig);
  rig.park();
  rig.function->answer(parked.id, {1});
  usleep(5000);
  CHECK(rig.used() == 0);
  CHECK(rig.function->rings()[0].inFlight == std::vector<uint16_t>{4});
  CHECK(rig.function->start(kFeatures).empty());
  CHECK(rig.awaitUsed(1));

  for (const bool drain : {true, false}) {
    send(rig, 8, 8);
    const ForwardedRequest forgotten = receive(rig);
    send(rig, 12, 8);
    CHECK(check::eventually([&] { return rig.function->inFlight() == 2; }));
    if (drain) rig.function->answer(forgotten.id, {2});
    rig.stop(drain);
    CHECK(rig.used() == (drain ? 2 : 0));
    rig.function->answer(forgotten.id, {3});
    CHECK(rig.function->inFlight() == 0 && rig.function->takeRequests().empty());
    memset(rig.memory, 0, 3 * 4096);
    rig.available = 0;
    rig.start();
  }
  send(rig, 4, 8);
  rig.function->answer(receive(rig).id, {});
  CHECK(rig.awaitUsed(1));
  CHECK(rig.usedElement(0) == std::make_pair(4u, 0u));
}

TEST(ring_forwarded_request_goes_on_elsewhere) {
  Rig rig({}, "forward");
  rig.start();
  send(rig, 4, 8);
  send(rig, 8, 8);
  CHECK(check::eventually([&] { return rig.function->inFlight() == 2; }));
  rig.park();
  QueueConfig config = Rig::config(2, 0);
  config.inFlight = rig.function->rings()[0].inFlight;
  rig.create();
  rig.start(config);
  std::vector<ForwardedRequest> requests;
  CHECK(check::eventually([&] {
    for (ForwardedRequest& request : rig.function->takeRequests()) requests.push_back(std::move(request));
    return requests.size() == 2;
  }));
  for (const ForwardedRequest& request : requests) rig.function->answer(request.id, request.readable);
  CHECK(rig.awaitUsed(2));
  CHECK(rig.usedElement(0).first == 4 && rig.usedElement(1).first == 8);
}

TEST(ring_forwarded_request_that_is_too_big_or_not_mapped_fails_the_function) {
  Rig rig({}, "forward");
  const auto failure = [&] {
    rig.offer(0);
    CHECK(check::eventually([&] { return !rig.function->failure().empty(); }));
    const std::string reason = rig.function->failure();
    rig.stop(false);
    memset(rig.memory, 0, 3 * 4096);
    rig.available = 0;
    return reason;
  };
  rig.start();
  rig.describe(0, kIova + kText, (1 << 20) + 1, 0, 0);
  CHECK(failure().find("at most 1048576") != std::string::npos);
  rig.start();
  rig.describe(0, kIova + kText, (1 << 20) + 1, 2, 0);
  CHECK(failure().find("at most 1048576") != std::string::npos);
  rig.start();
  rig.describe(0, kIova + kMemory - 4, 8, 0, 0);
  CHECK(failure().find("not in mapped memory") != std::string::npos);
  rig.start();
  rig.describe(0, kIova + kText, 8, 3, 1);
  rig.describe(1, kIova + kText, 8, 0, 0);
  CHECK(failure().find("behind a writable") != std::string::npos);

  rig.start();
  rig.describe(0, kIova + kMemory - 4, 8, 2, 0);
  rig.offer(0);
  rig.function->answer(receive(rig).id, std::vector<uint8_t>(8));
  CHECK(check::eventually([&] { return rig.function->failure().find("not in mapped memory") != std::string::npos; }));
  rig.stop(false);
}

/** One head after the other with the same indirect table: a megabyte to read, a megabyte to write. */
void offerLargest(Rig& rig, int chains) {
  for (int count = 0; count < chains; count++) {
    const uint16_t head = rig.available % kRing;
    rig.describe(head, kIova + kHeaders, 32, 4, 0);
    rig.offer(head);
  }
}

TEST(ring_forwarded_requests_count_until_they_are_given_back) {
  Rig rig({}, "forward");
  rig.describe(kHeaders / 16, kIova + kText, 1 << 20, 1, 1);
  rig.describe(kHeaders / 16 + 1, kIova + kText, 1 << 20, 2, 0);
  rig.start();
  constexpr int kMost = 32;
  const auto take = [&](int chains) {
    std::vector<uint64_t> ids;
    CHECK(check::eventually([&] {
      for (const ForwardedRequest& request : rig.function->takeRequests()) ids.push_back(request.id);
      return ids.size() == static_cast<size_t>(chains);
    }));
    return ids;
  };
  for (uint16_t round = 1; round <= 3; round++) {
    offerLargest(rig, kMost);
    for (const uint64_t id : take(kMost)) rig.function->answer(id, {1});
    CHECK(rig.awaitUsed(round * kMost));
  }
  CHECK(rig.function->failure().empty());
  offerLargest(rig, kMost);
  take(kMost);
  CHECK(rig.function->failure().empty());
  offerLargest(rig, 1);
  CHECK(check::eventually([&] { return !rig.function->failure().empty(); }));
  CHECK(rig.function->failure().find("unanswered") != std::string::npos);
  CHECK(rig.function->takeRequests().empty());

  rig.stop(false);
  memset(rig.memory, 0, 3 * 4096);
  rig.available = 0;
  rig.start();
  offerLargest(rig, kMost);
  take(kMost);
  CHECK(rig.function->failure().empty());
}

TEST(ring_forwarded_request_in_more_pieces_than_a_system_call_takes_is_whole) {
  constexpr uint32_t kDirect = 40;
  constexpr uint32_t kTable = 1024;
  constexpr uint32_t kPieces = kDirect + kTable - 1;
  Rig rig({}, "forward");
  rig.start();
  for (const bool writable : {false, true}) {
    // Bytes that do not lie side by side: forty of the ring and the rest of a table, whose last is of the other kind.
    const uint16_t flags = writable ? 2 : 0;
    const auto at = [](uint32_t piece) { return kText + 2 * piece; };
    const auto piece = [&](uint16_t index, uint32_t number) {
      rig.describe(index, kIova + at(number), 1, flags | 1, static_cast<uint16_t>(index + 1));
    };
    for (uint32_t index = 0; index < kDirect; index++) piece(static_cast<uint16_t>(index), index);
    rig.describe(kDirect, kIova + kHeaders, kTable * 16, 4, 0);
    const uint16_t table = kHeaders / 16;
    for (uint32_t index = 0; index + 1 < kTable; index++) {
      rig.describe(static_cast<uint16_t>(table + index), kIova + at(kDirect + index), 1, flags | 1,
                   static_cast<uint16_t>(index + 1));
    }
    rig.describe(table + kTable - 1, kIova + kRoom, 1, 2, 0);
    for (uint32_t number = 0; number < kPieces; number++) rig.memory[at(number)] = static_cast<uint8_t>(number * 7);
    rig.offer(0);
    const ForwardedRequest request = receive(rig);
    std::vector<uint8_t> bytes(kPieces + 1);
    for (uint32_t number = 0; number < kPieces; number++) bytes[number] = static_cast<uint8_t>(number * 7 + writable);
    bytes[kPieces] = 99;
    if (!writable) {
      CHECK(request.readable == std::vector<uint8_t>(bytes.begin(), bytes.end() - 1));
      rig.function->answer(request.id, {99});
      CHECK(rig.awaitUsed(1));
    } else {
      CHECK(request.writable == bytes.size());
      rig.function->answer(request.id, bytes);
      CHECK(rig.awaitUsed(2));
      bool same = true;
      for (uint32_t number = 0; number < kPieces; number++) same &= rig.memory[at(number)] == bytes[number];
      CHECK(same);
    }
    CHECK(rig.memory[kRoom] == 99);
    rig.memory[kRoom] = 0;
  }
}

}  // namespace
