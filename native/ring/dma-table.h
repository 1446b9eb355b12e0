#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace vhostd::ring {

/** One range of guest memory, mapped into this process. Bytes. */
struct DmaMapping {
  uint64_t iova = 0;
  uint64_t size = 0;
  /** Where `iova` is in this process. */
  uint8_t* host = nullptr;
  bool writable = false;
  /** What was given by mmap: begins before `host` where the file has huge pages. */
  uint8_t* area = nullptr;
  size_t areaSize = 0;
};

/** Maps part of a file. 0 or -errno; -EINVAL where the file is shorter than that. */
int mapFile(int fd, uint64_t offset, uint64_t size, bool writable, DmaMapping& mapping);
void unmapFile(const DmaMapping& mapping);
/**
 * Unmaps on a thread of its own what may take long: the last reference to a big file gives all its pages back.
 * `underWay` counts the threads that have not ended.
 */
void unmapFiles(std::vector<DmaMapping> mappings, const std::shared_ptr<std::atomic<int>>& underWay);

/** The IOVAs a function may reach. Not locked: its owner's gate is. Never touches the memory itself. */
class DmaTable {
 public:
  /** 0, or -EEXIST where it overlaps another. */
  int insert(const DmaMapping& mapping);
  /** Exactly the range that was inserted. 0 or -ENOENT. */
  int remove(uint64_t iova, uint64_t size, DmaMapping& removed);
  std::vector<DmaMapping> removeAll();

  /** Where [iova, iova + size) is, if wholly inside one mapping; else nullptr. */
  uint8_t* contiguous(uint64_t iova, uint64_t size, bool writable) const;
  /**
   * Appends [iova, iova + size), which may run over adjacent mappings. False where a byte of it is not mapped, or not
   * writable although it should be; `out` is then unspecified.
   */
  bool translate(uint64_t iova, uint64_t size, bool writable, std::vector<iovec>& out) const;

 private:
  const DmaMapping* find(uint64_t iova) const;

  /** Ascending, disjoint. */
  std::vector<DmaMapping> mappings_;
};

}  // namespace vhostd::ring
