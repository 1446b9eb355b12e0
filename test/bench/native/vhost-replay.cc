/**
 * Replays what front-ends say, each on its own connection, all of them at once: a message that is answered keeps the
 * messages behind it on the same connection waiting, and nothing else.
 *
 *   vhost-replay SCRIPT
 *
 * SCRIPT has lines. "send FRONTEND BYTES FDS ANSWER": bytes of a message in hexadecimal, the descriptors that go with it
 * ("3,4"), and the payload of its answer; for each "-" where there is none, and "?" for an answer of any payload.
 * "until FRONTEND OFFSET INDEX CALL": waits, when all messages of that front-end are out, until the used ring's index at
 * this offset of the memory is INDEX; CALL is signalled then. Numbers are decimal. Descriptors: 3 the memory file,
 * 4 + FRONTEND the connections. Prints microseconds from the first message to the end of all.
 */
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace {

constexpr int kMemory = 3;
constexpr int kFirstConnection = 4;
constexpr int kPatienceMs = 60'000;
constexpr uint32_t kIsReply = 1u << 2;

struct Header {
  uint32_t request;
  uint32_t flags;
  uint32_t size;
};

struct Message {
  std::vector<uint8_t> bytes;
  std::vector<int> fds;
  bool answered = false;
  bool anyAnswer = false;
  std::vector<uint8_t> answer;
};

struct Frontend {
  int connection = -1;
  std::vector<Message> messages;
  /** The next message to be sent. */
  size_t at = 0;
  bool waitsForAnswer = false;
  const uint16_t* used = nullptr;
  uint16_t usedIndex = 0;
  int call = -1;
};

[[noreturn]] void fail(const char* what) {
  fprintf(stderr, "%s: %s\n", what, strerror(errno));
  exit(1);
}

[[noreturn]] void refuse(const Frontend& frontend, const char* what) {
  const size_t at = frontend.at - 1;
  uint32_t request = 0;
  memcpy(&request, frontend.messages[at].bytes.data(), sizeof request);
  fprintf(stderr, "front-end %d, request %u (message %zu): %s\n", frontend.connection - kFirstConnection, request, at, what);
  exit(1);
}

double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1e6 + time.tv_nsec * 1e-3;
}

std::vector<uint8_t> fromHex(const std::string& text) {
  std::vector<uint8_t> bytes;
  for (size_t i = 0; i + 1 < text.size(); i += 2) {
    bytes.push_back(static_cast<uint8_t>(strtoul(text.substr(i, 2).c_str(), nullptr, 16)));
  }
  return bytes;
}

void readScript(const char* path, std::vector<Frontend>& frontends) {
  struct stat file;
  if (fstat(kMemory, &file) != 0) fail("memory");
  auto* memory = static_cast<uint8_t*>(mmap(nullptr, file.st_size, PROT_READ, MAP_SHARED, kMemory, 0));
  if (memory == MAP_FAILED) fail("mmap");
  std::ifstream script(path);
  std::string line, word;
  while (std::getline(script, line)) {
    std::istringstream words(line);
    size_t index = 0;
    words >> word >> index;
    if (index >= frontends.size()) frontends.resize(index + 1);
    Frontend& frontend = frontends[index];
    frontend.connection = kFirstConnection + static_cast<int>(index);
    if (word == "until") {
      uint64_t offset = 0;
      words >> offset >> frontend.usedIndex >> frontend.call;
      frontend.used = reinterpret_cast<const uint16_t*>(memory + offset);
      continue;
    }
    Message message;
    std::string bytes, fds, answer;
    words >> bytes >> fds >> answer;
    message.bytes = fromHex(bytes);
    std::istringstream list(fds == "-" ? "" : fds);
    for (std::string fd; std::getline(list, fd, ',');) message.fds.push_back(std::stoi(fd));
    message.answered = answer != "-";
    message.anyAnswer = answer == "?";
    message.answer = fromHex(answer);
    frontend.messages.push_back(std::move(message));
  }
}

void send(const Frontend& frontend, const Message& message) {
  iovec part{const_cast<uint8_t*>(message.bytes.data()), message.bytes.size()};
  alignas(cmsghdr) uint8_t control[CMSG_SPACE(sizeof(int) * 16)] = {};
  msghdr out{};
  out.msg_iov = &part;
  out.msg_iovlen = 1;
  if (!message.fds.empty()) {
    const size_t size = sizeof(int) * message.fds.size();
    out.msg_control = control;
    out.msg_controllen = CMSG_SPACE(size);
    cmsghdr* head = CMSG_FIRSTHDR(&out);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(size);
    memcpy(CMSG_DATA(head), message.fds.data(), size);
  }
  if (sendmsg(frontend.connection, &out, MSG_NOSIGNAL) != static_cast<ssize_t>(part.iov_len)) fail("sendmsg");
}

/** As much as may go out now. */
void advance(Frontend& frontend) {
  while (!frontend.waitsForAnswer && frontend.at < frontend.messages.size()) {
    const Message& message = frontend.messages[frontend.at++];
    send(frontend, message);
    frontend.waitsForAnswer = message.answered;
  }
}

void takeAnswer(Frontend& frontend) {
  const Message& message = frontend.messages[frontend.at - 1];
  Header header, asked;
  memcpy(&asked, message.bytes.data(), sizeof asked);
  if (recv(frontend.connection, &header, sizeof header, MSG_WAITALL) != sizeof header) refuse(frontend, "hung up");
  std::vector<uint8_t> payload(header.size);
  if (header.size > 0 && recv(frontend.connection, payload.data(), header.size, MSG_WAITALL) != header.size) {
    refuse(frontend, "hung up in an answer");
  }
  if (header.request != asked.request || (header.flags & kIsReply) == 0) refuse(frontend, "something else is answered");
  if (!message.anyAnswer && payload != message.answer) refuse(frontend, "another answer was expected");
  frontend.waitsForAnswer = false;
}

bool isOver(const Frontend& frontend) {
  if (frontend.waitsForAnswer || frontend.at < frontend.messages.size()) return false;
  return frontend.used == nullptr || __atomic_load_n(frontend.used, __ATOMIC_ACQUIRE) == frontend.usedIndex;
}

void waitForAny(std::vector<Frontend>& frontends) {
  std::vector<pollfd> waits;
  std::vector<Frontend*> who;
  for (Frontend& frontend : frontends) {
    if (isOver(frontend)) continue;
    waits.push_back({frontend.waitsForAnswer ? frontend.connection : frontend.call, POLLIN, 0});
    who.push_back(&frontend);
  }
  if (waits.empty()) return;
  const int ready = poll(waits.data(), waits.size(), kPatienceMs);
  if (ready < 0) fail("poll");
  if (ready == 0) refuse(*who[0], "nothing comes");
  for (size_t i = 0; i < waits.size(); i++) {
    if (waits[i].revents == 0) continue;
    Frontend& frontend = *who[i];
    uint64_t calls;
    if (!frontend.waitsForAnswer) {
      if (read(frontend.call, &calls, sizeof calls) < 0 && errno != EAGAIN) fail("call");
      continue;
    }
    takeAnswer(frontend);
    advance(frontend);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  std::vector<Frontend> frontends;
  readScript(argv[1], frontends);
  for (Frontend& frontend : frontends) {
    // What is read here is waited for.
    if (fcntl(frontend.connection, F_SETFL, fcntl(frontend.connection, F_GETFL) & ~O_NONBLOCK) != 0) fail("connection");
  }
  const double begin = now();
  for (Frontend& frontend : frontends) advance(frontend);
  for (bool over = false; !over;) {
    waitForAny(frontends);
    over = true;
    for (const Frontend& frontend : frontends) over = over && isOver(frontend);
  }
  const double end = now();
  for (Frontend& frontend : frontends) {
    if (fcntl(frontend.connection, F_SETFL, fcntl(frontend.connection, F_GETFL) | O_NONBLOCK) != 0) fail("connection");
  }
  printf("%.0f\n", end - begin);
  return 0;
}
