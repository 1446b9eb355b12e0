/**
 * What is asked of the fd of a VFIO device (linux/vfio.h). The structures themselves are those of vfio-user, which took
 * them over: DEVICE_INFO, REGION_INFO with its capabilities, IRQ_INFO and IRQ_SET of src/vfio-user/messages.ts.
 */

/** _IO(VFIO_TYPE, VFIO_BASE + number): neither direction nor size is part of a request. */
const request = (number: number) => (";".charCodeAt(0) << 8) | (100 + number);

export const DeviceRequest = {
  /** VFIO_DEVICE_GET_INFO, DEVICE_INFO */
  getInfo: request(7),
  /** VFIO_DEVICE_GET_REGION_INFO, REGION_INFO */
  getRegionInfo: request(8),
  /** VFIO_DEVICE_GET_IRQ_INFO, IRQ_INFO */
  getIrqInfo: request(9),
  /** VFIO_DEVICE_SET_IRQS, IRQ_SET followed by one s32 for each interrupt */
  setIrqs: request(10),
  /** VFIO_DEVICE_RESET, by value: nothing */
  reset: request(11),
} as const;

/** The whole region can be mapped, the MSI-X table in it too (which is set up by SET_IRQS all the same). */
export const REGION_CAP_MSIX_MAPPABLE = 3;

/** In the place of an eventfd: the interrupt goes nowhere. */
export const NO_EVENTFD = -1;
