#include "dma-table.h"

#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "../thread.h"

namespace vhostd::ring {
namespace {

/** From here on giving the pages back may take a millisecond. */
constexpr size_t kSlowBytes = 4 << 20;

}  // namespace

int mapFile(int fd, uint64_t offset, uint64_t size, bool writable, DmaMapping& mapping) {
  struct stat file;
  struct statfs filesystem;
  if (fstat(fd, &file) != 0 || fstatfs(fd, &filesystem) != 0) return -errno;
  const bool huge = filesystem.f_type == HUGETLBFS_MAGIC;
  const uint64_t page = huge ? filesystem.f_bsize : sysconf(_SC_PAGESIZE);
  // The last page is there as a whole, however little of it the file has.
  const uint64_t whole = (static_cast<uint64_t>(file.st_size) + page - 1) / page * page;
  uint64_t end;
  if (__builtin_add_overflow(offset, size, &end) || size == 0 || end > whole) return -EINVAL;
  const uint64_t lead = offset % page;
  const uint64_t areaSize = (lead + size + page - 1) / page * page;
  void* area = mmap(nullptr, areaSize, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, offset - lead);
  if (area == MAP_FAILED) return -errno;
  mapping.size = size;
  mapping.writable = writable;
  mapping.area = static_cast<uint8_t*>(area);
  mapping.areaSize = areaSize;
  mapping.host = mapping.area + lead;
  return 0;
}

void unmapFile(const DmaMapping& mapping) {
  munmap(mapping.area, mapping.areaSize);
}

void unmapFiles(std::vector<DmaMapping> mappings, const std::shared_ptr<std::atomic<int>>& underWay) {
  struct Job {
    std::vector<DmaMapping> mappings;
    std::shared_ptr<std::atomic<int>> underWay;
  };
  size_t bytes = 0;
  for (const DmaMapping& mapping : mappings) bytes += mapping.areaSize;
  auto job = std::make_unique<Job>(Job{std::move(mappings), underWay});
  const auto run = [](void* argument) -> void* {
    const std::unique_ptr<Job> own(static_cast<Job*>(argument));
    for (const DmaMapping& mapping : own->mappings) unmapFile(mapping);
    own->underWay->fetch_sub(1);
    return nullptr;
  };
  underWay->fetch_add(1);
  if (bytes >= kSlowBytes && startThread(nullptr, run, job.get()) == 0) {
    job.release();
  } else {
    run(job.release());
  }
}

int DmaTable::insert(const DmaMapping& mapping) {
  const auto next = std::lower_bound(mappings_.begin(), mappings_.end(), mapping.iova,
                                     [](const DmaMapping& one, uint64_t iova) { return one.iova < iova; });
  if (next != mappings_.end() && next->iova - mapping.iova < mapping.size) return -EEXIST;
  if (next != mappings_.begin()) {
    const DmaMapping& before = *std::prev(next);
    if (mapping.iova - before.iova < before.size) return -EEXIST;
  }
  mappings_.insert(next, mapping);
  return 0;
}

int DmaTable::remove(uint64_t iova, uint64_t size, DmaMapping& removed) {
  for (auto mapping = mappings_.begin(); mapping != mappings_.end(); ++mapping) {
    if (mapping->iova != iova || mapping->size != size) continue;
    removed = *mapping;
    mappings_.erase(mapping);
    return 0;
  }
  return -ENOENT;
}

std::vector<DmaMapping> DmaTable::removeAll() {
  return std::exchange(mappings_, {});
}

const DmaMapping* DmaTable::find(uint64_t iova) const {
  auto next = std::upper_bound(mappings_.begin(), mappings_.end(), iova,
                               [](uint64_t value, const DmaMapping& one) { return value < one.iova; });
  if (next == mappings_.begin()) return nullptr;
  const DmaMapping& mapping = *std::prev(next);
  return iova - mapping.iova < mapping.size ? &mapping : nullptr;
}

uint8_t* DmaTable::contiguous(uint64_t iova, uint64_t size, bool writable) const {
  const DmaMapping* mapping = find(iova);
  if (mapping == nullptr || (writable && !mapping->writable)) return nullptr;
  const uint64_t skip = iova - mapping->iova;
  return size <= mapping->size - skip ? mapping->host + skip : nullptr;
}

bool DmaTable::translate(uint64_t iova, uint64_t size, bool writable, std::vector<iovec>& out) const {
  while (size > 0) {
    const DmaMapping* mapping = find(iova);
    if (mapping == nullptr || (writable && !mapping->writable)) return false;
    const uint64_t skip = iova - mapping->iova;
    const uint64_t part = std::min(size, mapping->size - skip);
    out.push_back({mapping->host + skip, part});
    iova += part;
    size -= part;
  }
  return true;
}

}  // namespace vhostd::ring
