/**
 * Opens a function as the least program does that uses VFIO's group interface, and closes it again.
 *
 *   vfio-open GROUP ADDRESS    prints nanoseconds from the first open to the last close
 *
 * The kernel resets the function at its open and at its close; nothing else is done to it here.
 */
#include <fcntl.h>
#include <linux/vfio.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>

namespace {

long long now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
}

int check(int result, const char* what) {
  if (result >= 0) return result;
  perror(what);
  exit(1);
}

}  // namespace

int main(int count, char** words) {
  if (count != 3) {
    fprintf(stderr, "vfio-open GROUP ADDRESS\n");
    return 2;
  }
  const std::string path = std::string("/dev/vfio/") + words[1];
  const long long begin = now();
  const int container = check(open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC), "/dev/vfio/vfio");
  const int group = check(open(path.c_str(), O_RDWR | O_CLOEXEC), path.c_str());
  check(ioctl(group, VFIO_GROUP_SET_CONTAINER, &container), "VFIO_GROUP_SET_CONTAINER");
  check(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU), "VFIO_SET_IOMMU");
  const int device = check(ioctl(group, VFIO_GROUP_GET_DEVICE_FD, words[2]), "VFIO_GROUP_GET_DEVICE_FD");
  check(close(device), "close of the device");
  check(close(group), "close of the group");
  check(close(container), "close of the container");
  printf("%lld\n", now() - begin);
  return 0;
}
