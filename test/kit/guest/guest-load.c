// guest-load: work whose every byte is known, in guests that are moved and on the machine that they speak to.
//
//   disk STATUS DEVICE LANES       direct writes to random blocks all over the disk, read back and compared
//   disk-check STATUS IMAGE        whether an image is what `disk` left; the same checksum must come out
//   memory STATUS MIB              pages that are changed and verified
//   udp-send STATUS IP PORT PACE   numbered datagrams, one each PACE microseconds
//   udp-receive STATUS PORT        counts those lost, twice there, late and wrong
//   tcp-send STATUS IP PORT RATE   a stream of known bytes, at most RATE KiB a second
//   tcp-receive STATUS PORT        verifies it
//   announcements STATUS DEVICE    counts frames with which a machine says where it is: gratuitous ARP, RARP
//
// STATUS is a file that always says how far it is ("failed: REASON" where something is wrong). SIGTERM ends the work: what
// was done is verified once more, and the status ends with "done".
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <netpacket/packet.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <linux/fs.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, WORDS = BLOCK / 8, RUN = 16, BUFFERS = 32, LANES_MAX = 16, STATUS_SIZE = 192, TCP_CHUNK = 16384 };

static int status_fd = -1;
static volatile sig_atomic_t stopping;
// Of the thread that writes: a reason is not overwritten.
static pthread_mutex_t reporting = PTHREAD_MUTEX_INITIALIZER;

// One write of a fixed size: a reader never sees half of it.
static void report(const char *format, ...) {
  char line[STATUS_SIZE];
  memset(line, ' ', sizeof line);
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(line, sizeof line - 1, format, arguments);
  va_end(arguments);
  if (length < 0 || length > STATUS_SIZE - 1) length = STATUS_SIZE - 1;
  line[length] = ' ';
  line[STATUS_SIZE - 1] = '\n';
  pthread_mutex_lock(&reporting);
  if (pwrite(status_fd, line, sizeof line, 0) < 0) _exit(2);
  // It is the last word.
  if (line[0] != 'f') pthread_mutex_unlock(&reporting);
}

#define FAIL(...) (report("failed: " __VA_ARGS__), _exit(1))

static void on_term(int signal) { (void)signal, stopping = 1; }

static uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

static uint64_t next(uint64_t *state) { return mix(*state += 0x9e3779b97f4a7c15u); }

static void pause_for(long microseconds) {
  struct timespec time = {microseconds / 1000000, microseconds % 1000000 * 1000};
  nanosleep(&time, NULL);
}

// A block says which it is, and which of its versions; all of its other words follow from that.
static void fill(uint64_t *words, uint32_t place, uint32_t version) {
  uint64_t seed = words[0] = (uint64_t)place << 32 | version;
  for (int i = 1; i < WORDS; i++) words[i] = seed = seed * 6364136223846793005u + 1442695040888963407u;
}

static int differs(const uint64_t *words, uint32_t place, uint32_t version) {
  uint64_t seed = (uint64_t)place << 32 | version;
  if (words[0] != seed) return 1;
  for (int i = 1; i < WORDS; i++)
    if (words[i] != (seed = seed * 6364136223846793005u + 1442695040888963407u)) return 1;
  return 0;
}

static void *pages(size_t size) {
  void *memory;
  if (posix_memalign(&memory, BLOCK, size) != 0) FAIL("no memory");
  return memset(memory, 0, size);
}

// disk

static const char *disk_path;
static uint32_t *versions;
static _Atomic uint64_t lane_rounds[LANES_MAX];
static uint64_t lanes;

struct lane { uint32_t first, count, number; };

// What was read stays where the device has put it, and is looked at again before the buffer is used anew.
struct kept { uint64_t *words; uint32_t place, count, versions[RUN]; };

static void check_kept(const struct kept *kept, const char *when) {
  for (uint32_t i = 0; i < kept->count; i++)
    if (differs(kept->words + (size_t)i * WORDS, kept->place + i, kept->versions[i]))
      FAIL("block %u %s is not version %u, but has %llx", kept->place + i, when, kept->versions[i],
           (unsigned long long)kept->words[(size_t)i * WORDS]);
}

static void read_run(int fd, struct kept *kept, uint32_t place, uint32_t count) {
  kept->count = 0;
  ssize_t got = pread(fd, kept->words, (size_t)count * BLOCK, (off_t)place * BLOCK);
  if (got != (ssize_t)count * BLOCK) FAIL("read of block %u: %s", place, got < 0 ? strerror(errno) : "short");
  kept->place = place, kept->count = count;
  memcpy(kept->versions, versions + place, count * sizeof *versions);
  check_kept(kept, "that was read");
}

static void write_run(int fd, uint64_t *words, uint32_t place, uint32_t count) {
  for (uint32_t i = 0; i < count; i++) fill(words + (size_t)i * WORDS, place + i, ++versions[place + i]);
  ssize_t done = pwrite(fd, words, (size_t)count * BLOCK, (off_t)place * BLOCK);
  if (done != (ssize_t)count * BLOCK) FAIL("write of block %u: %s", place, done < 0 ? strerror(errno) : "short");
}

// Each processor has a queue of its own.
static void stay_on(uint32_t processor) {
  cpu_set_t cpu;
  CPU_ZERO(&cpu);
  CPU_SET(processor % (uint32_t)sysconf(_SC_NPROCESSORS_ONLN), &cpu);
  sched_setaffinity(0, sizeof cpu, &cpu);
}

static void *run_lane(void *argument) {
  struct lane *lane = argument;
  stay_on(lane->number);
  int fd = open(disk_path, O_RDWR | O_DIRECT);
  if (fd < 0) FAIL("%s: %s", disk_path, strerror(errno));
  struct kept kept[BUFFERS];
  for (int i = 0; i < BUFFERS; i++) kept[i] = (struct kept){.words = pages(RUN * BLOCK)};
  uint64_t *out = pages(RUN * BLOCK), random = lane->number + 1;
  for (uint32_t done = 0; done < lane->count; done += RUN)
    write_run(fd, out, lane->first + done, lane->count - done < RUN ? lane->count - done : RUN);
  for (uint64_t round = 0; !stopping; round++) {
    uint32_t count = (uint32_t)(next(&random) % RUN) + 1;
    uint32_t place = lane->first + (uint32_t)(next(&random) % (lane->count - count + 1));
    struct kept *buffer = kept + round % BUFFERS;
    check_kept(buffer, "that was kept");
    buffer->count = 0;
    if (next(&random) % 2) write_run(fd, out, place, count);
    read_run(fd, buffer, place, count);
    lane_rounds[lane->number] = round + 1;
    pause_for(2000);
  }
  for (int i = 0; i < BUFFERS; i++) check_kept(kept + i, "that was kept");
  for (uint32_t done = 0; done < lane->count; done += RUN)
    read_run(fd, kept, lane->first + done, lane->count - done < RUN ? lane->count - done : RUN);
  close(fd);
  return NULL;
}

static uint64_t least_rounds(void) {
  uint64_t least = UINT64_MAX;
  for (uint64_t i = 0; i < lanes; i++)
    if (lane_rounds[i] < least) least = lane_rounds[i];
  return least;
}

static uint64_t checksum(uint32_t blocks) {
  uint64_t sum = 0;
  for (uint32_t i = 0; i < blocks; i++) sum = mix(sum ^ versions[i]);
  return sum;
}

static uint32_t blocks_of(int fd) {
  struct stat stat;
  uint64_t bytes;
  if (fstat(fd, &stat) != 0) FAIL("%s: %s", disk_path, strerror(errno));
  if (!S_ISBLK(stat.st_mode)) bytes = (uint64_t)stat.st_size;
  else if (ioctl(fd, BLKGETSIZE64, &bytes) != 0) FAIL("%s: %s", disk_path, strerror(errno));
  return (uint32_t)(bytes / BLOCK);
}

static void disk(const char *path, const char *lane_count) {
  disk_path = path;
  int fd = open(path, O_RDONLY);
  if (fd < 0) FAIL("%s: %s", path, strerror(errno));
  uint32_t blocks = blocks_of(fd);
  lanes = strtoul(lane_count, NULL, 10);
  if (lanes < 1 || lanes > LANES_MAX) FAIL("%llu lanes", (unsigned long long)lanes);
  versions = pages(blocks * sizeof *versions + BLOCK);
  pthread_t threads[LANES_MAX];
  struct lane each[LANES_MAX];
  for (uint32_t i = 0; i < lanes; i++) {
    each[i] = (struct lane){i * (blocks / lanes), blocks / lanes, i};
    if (i == lanes - 1) each[i].count = blocks - each[i].first;
    if (pthread_create(threads + i, NULL, run_lane, each + i) != 0) FAIL("no thread");
  }
  while (!stopping) report("rounds %llu", (unsigned long long)least_rounds()), pause_for(50000);
  for (uint32_t i = 0; i < lanes; i++) pthread_join(threads[i], NULL);
  report("rounds %llu checksum %016llx done", (unsigned long long)least_rounds(), (unsigned long long)checksum(blocks));
}

static void disk_check(const char *path) {
  disk_path = path;
  int fd = open(path, O_RDONLY);
  if (fd < 0) FAIL("%s: %s", path, strerror(errno));
  uint32_t blocks = blocks_of(fd);
  versions = pages(blocks * sizeof *versions + BLOCK);
  uint64_t *words = pages(BLOCK);
  for (uint32_t i = 0; i < blocks; i++) {
    if (pread(fd, words, BLOCK, (off_t)i * BLOCK) != BLOCK) FAIL("read of block %u: %s", i, strerror(errno));
    versions[i] = (uint32_t)words[0];
    if (differs(words, i, versions[i])) FAIL("block %u of the image is no version of it: %llx", i, (unsigned long long)words[0]);
  }
  report("checksum %016llx done", (unsigned long long)checksum(blocks));
}

// memory

static void memory(const char *size) {
  uint32_t count = (uint32_t)strtoul(size, NULL, 10) * (1048576 / BLOCK);
  uint64_t *words = pages((size_t)count * BLOCK), random = 7, rounds = 0;
  versions = pages(count * sizeof *versions + BLOCK);
  for (uint32_t i = 0; i < count; i++) fill(words + (size_t)i * WORDS, i, versions[i]);
  for (; !stopping; rounds++) {
    uint32_t page = (uint32_t)(next(&random) % count);
    if (differs(words + (size_t)page * WORDS, page, versions[page])) FAIL("page %u is not version %u", page, versions[page]);
    fill(words + (size_t)page * WORDS, page, ++versions[page]);
    if (rounds % 4 == 0) pause_for(2000);
    if (rounds % 64 == 0) report("rounds %llu", (unsigned long long)rounds);
  }
  for (uint32_t i = 0; i < count; i++)
    if (differs(words + (size_t)i * WORDS, i, versions[i])) FAIL("page %u is not version %u at the end", i, versions[i]);
  report("rounds %llu done", (unsigned long long)rounds);
}

// udp

enum { DATAGRAM_WORDS = 32, WINDOW = 65536 };

static struct sockaddr_in address_of(const char *ip, const char *port) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)strtoul(port, NULL, 10))};
  if (inet_pton(AF_INET, ip, &address.sin_addr) != 1) FAIL("%s is no address", ip);
  return address;
}

static void udp_send(const char *ip, const char *port, const char *pace) {
  struct sockaddr_in to = address_of(ip, port);
  int fd = socket(AF_INET, SOCK_DGRAM, 0);
  uint64_t words[DATAGRAM_WORDS], number = 0;
  // Between two queues there is no order.
  stay_on(0);
  for (; !stopping; number++) {
    for (int i = 0; i < DATAGRAM_WORDS; i++) words[i] = i == 0 ? number : mix(number + (uint64_t)i);
    // One that cannot be sent is one that is lost.
    sendto(fd, words, sizeof words, 0, (struct sockaddr *)&to, sizeof to);
    if (number % 32 == 0) report("sent %llu", (unsigned long long)number);
    pause_for(strtol(pace, NULL, 10));
  }
  report("sent %llu done", (unsigned long long)number);
}

static int bound(int type, const char *port) {
  struct sockaddr_in own = address_of("0.0.0.0", port);
  int fd = socket(AF_INET, type, 0), yes = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  if (bind(fd, (struct sockaddr *)&own, sizeof own) != 0) FAIL("port %s: %s", port, strerror(errno));
  return fd;
}

static int readable(int fd) {
  struct pollfd wait = {fd, POLLIN, 0};
  return poll(&wait, 1, 50) == 1;
}

static void udp_receive(const char *port) {
  int fd = bound(SOCK_DGRAM, port);
  static uint64_t seen[WINDOW];
  uint64_t words[DATAGRAM_WORDS], received = 0, highest = 0, twice = 0, late = 0, wrong = 0, hole = 0;
  report("received 0");
  while (!stopping) {
    if (!readable(fd) || recv(fd, words, sizeof words, MSG_DONTWAIT) != sizeof words) continue;
    uint64_t number = words[0];
    for (int i = 1; i < DATAGRAM_WORDS; i++)
      if (words[i] != mix(number + (uint64_t)i)) { wrong++; break; }
    if (seen[number % WINDOW] == number + 1) twice++;
    else if (number < highest) late++;
    else if (received > 0 && number - highest - 1 > hole) hole = number - highest - 1;
    seen[number % WINDOW] = number + 1;
    if (number > highest) highest = number;
    received++;
    report("received %llu highest %llu twice %llu late %llu wrong %llu hole %llu", (unsigned long long)received,
           (unsigned long long)highest, (unsigned long long)twice, (unsigned long long)late, (unsigned long long)wrong,
           (unsigned long long)hole);
  }
  report("received %llu highest %llu twice %llu late %llu wrong %llu hole %llu done", (unsigned long long)received,
         (unsigned long long)highest, (unsigned long long)twice, (unsigned long long)late, (unsigned long long)wrong,
         (unsigned long long)hole);
}

// tcp: the word at each place of the stream follows from the place.

static void tcp_send(const char *ip, const char *port, const char *rate) {
  struct sockaddr_in to = address_of(ip, port);
  int fd = -1;
  for (int attempt = 0; attempt < 200 && fd < 0; attempt++) {
    fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (struct sockaddr *)&to, sizeof to) == 0) break;
    close(fd), fd = -1, pause_for(100000);
  }
  if (fd < 0) FAIL("connect: %s", strerror(errno));
  long pace = (long)(TCP_CHUNK / 1024 * 1000000ll / strtol(rate, NULL, 10));
  uint64_t words[TCP_CHUNK / 8], sent = 0, heard = 0;
  while (!stopping) {
    for (size_t i = 0; i < TCP_CHUNK / 8; i++) words[i] = mix(sent / 8 + i);
    for (size_t done = 0; done < sizeof words;) {
      ssize_t part = send(fd, (char *)words + done, sizeof words - done, MSG_NOSIGNAL);
      if (part < 0 && errno == EINTR) continue;
      if (part <= 0) FAIL("send after %llu bytes: %s", (unsigned long long)sent, strerror(errno));
      done += (size_t)part;
    }
    sent += sizeof words;
    report("bytes %llu", (unsigned long long)sent);
    pause_for(pace);
  }
  shutdown(fd, SHUT_WR);
  if (recv(fd, &heard, sizeof heard, MSG_WAITALL) != sizeof heard || heard != sent)
    FAIL("%llu bytes sent, %llu received", (unsigned long long)sent, (unsigned long long)heard);
  report("bytes %llu done", (unsigned long long)sent);
}

static void tcp_receive(const char *port) {
  int listener = bound(SOCK_STREAM, port);
  listen(listener, 1);
  report("bytes 0");
  int fd = accept(listener, NULL, NULL);
  static unsigned char chunk[TCP_CHUNK];
  uint64_t received = 0;
  for (ssize_t part; (part = recv(fd, chunk, sizeof chunk, 0)) != 0;) {
    if (part < 0 && errno == EINTR) continue;
    if (part < 0) FAIL("receive after %llu bytes: %s", (unsigned long long)received, strerror(errno));
    for (ssize_t i = 0; i < part; i++) {
      uint64_t place = received + (uint64_t)i;
      if (chunk[i] != (unsigned char)(mix(place / 8) >> place % 8 * 8)) FAIL("byte %llu is wrong", (unsigned long long)place);
    }
    received += (uint64_t)part;
    report("bytes %llu", (unsigned long long)received);
  }
  send(fd, &received, sizeof received, MSG_NOSIGNAL);
  report("bytes %llu done", (unsigned long long)received);
}

// announcements

static void announcements(const char *device) {
  int fd = socket(AF_PACKET, SOCK_RAW, htons(3));
  struct sockaddr_ll own = {.sll_family = AF_PACKET, .sll_protocol = htons(3), .sll_ifindex = (int)if_nametoindex(device)};
  if (fd < 0 || bind(fd, (struct sockaddr *)&own, sizeof own) != 0) FAIL("%s: %s", device, strerror(errno));
  unsigned char frame[128];
  uint64_t arp = 0, rarp = 0;
  for (report("arp 0 rarp 0"); !stopping;) {
    if (!readable(fd) || recv(fd, frame, sizeof frame, MSG_DONTWAIT) < 42) continue;
    // Sender and target are the same machine.
    if (frame[12] == 0x08 && frame[13] == 0x06 && memcmp(frame + 28, frame + 38, 4) == 0) arp++;
    if (frame[12] == 0x80 && frame[13] == 0x35 && memcmp(frame + 22, frame + 32, 6) == 0) rarp++;
    report("arp %llu rarp %llu", (unsigned long long)arp, (unsigned long long)rarp);
  }
  report("arp %llu rarp %llu done", (unsigned long long)arp, (unsigned long long)rarp);
}

int main(int count, char **words) {
  if (count < 4) return 2;
  status_fd = open(words[2], O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (status_fd < 0) return 2;
  struct sigaction term = {.sa_handler = on_term};
  sigaction(SIGTERM, &term, NULL);
  const char *what = words[1], *third = count > 4 ? words[4] : "", *fourth = count > 5 ? words[5] : "";
  if (strcmp(what, "disk") == 0) disk(words[3], third);
  else if (strcmp(what, "disk-check") == 0) disk_check(words[3]);
  else if (strcmp(what, "memory") == 0) memory(words[3]);
  else if (strcmp(what, "udp-send") == 0) udp_send(words[3], third, fourth);
  else if (strcmp(what, "udp-receive") == 0) udp_receive(words[3]);
  else if (strcmp(what, "tcp-send") == 0) tcp_send(words[3], third, fourth);
  else if (strcmp(what, "tcp-receive") == 0) tcp_receive(words[3]);
  else if (strcmp(what, "announcements") == 0) announcements(words[3]);
  else return 2;
  return 0;
}
