#include <errno.h>
#include <sys/mman.h>

#include "guard.h"
#include "symbols.h"

int64_t vhostd_map(int32_t fd, int64_t offset, int64_t size, int32_t writable) {
  void* address =
      mmap(nullptr, static_cast<size_t>(size), writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, offset);
  return address == MAP_FAILED ? -errno : reinterpret_cast<int64_t>(address);
}

int32_t vhostd_unmap(int64_t address, int64_t size) {
  return munmap(reinterpret_cast<void*>(address), static_cast<size_t>(size)) < 0 ? -errno : 0;
}

int32_t vhostd_disown(int64_t address, int64_t size) {
  return madvise(reinterpret_cast<void*>(address), static_cast<size_t>(size), MADV_DONTNEED) < 0 ? -errno : 0;
}

namespace {

// One access of exactly this width: a register may act on being read, and a split write means something else.
template <typename Word>
int64_t read(int64_t address) {
  Word value = 0;
  bool done = vhostd::guarded([&] { value = *reinterpret_cast<const volatile Word*>(address); });
  return done ? static_cast<int64_t>(value) : -EFAULT;
}

template <typename Word>
int32_t write(int64_t address, uint32_t value) {
  bool done = vhostd::guarded([=] { *reinterpret_cast<volatile Word*>(address) = static_cast<Word>(value); });
  return done ? 0 : -EFAULT;
}

}  // namespace

int64_t vhostd_read8(int64_t address) { return read<uint8_t>(address); }
int64_t vhostd_read16(int64_t address) { return read<uint16_t>(address); }
int64_t vhostd_read32(int64_t address) { return read<uint32_t>(address); }
int32_t vhostd_write8(int64_t address, uint32_t value) { return write<uint8_t>(address, value); }
int32_t vhostd_write16(int64_t address, uint32_t value) { return write<uint16_t>(address, value); }
int32_t vhostd_write32(int64_t address, uint32_t value) { return write<uint32_t>(address, value); }
