/** What tests of this project and of plugins elsewhere stand on. */
export { Arena } from "./arena.ts";
export { type ConformanceSubject, testDeviceClass } from "./conformance/index.ts";
export { DriverQueue } from "./driver-queue.ts";
export { type Completed, DriverRing, type DriverRingOptions, type Submitted } from "./driver-ring.ts";
export { BackendRequests, WireChannel, type WireMessage } from "./frontend/channel.ts";
export { FrontendDirtyLog } from "./frontend/dirty-log.ts";
export {
  FrontendListener,
  type FrontendQueue,
  type NegotiateOptions,
  type QueueOptions,
  VhostUserFrontend,
} from "./frontend/frontend.ts";
export { FrontendMemory, type MemoryRegion } from "./frontend/memory.ts";
export { Migration } from "./frontend/migration.ts";
export {
  type EarlySetup,
  presetup,
  setLogBase,
  startLogging,
  stopLogging,
} from "./frontend/migration-messages.ts";
export { type DriverMemory, GuestMemoryFile } from "./guest-memory-file.ts";
export { MockTarget, type MockTargetOptions, mockDeviceClass } from "./mock-target.ts";
