import type { VhostUserFrontend } from "../frontend/frontend.ts";
import { VerifiedDisk } from "../verified-disk.ts";
import { FRONTEND_MEMORY } from "./frontend-process.ts";

/** Blocks of each queue's part of the disk. */
const BLOCKS = 256;

/** A session's begin: the guest's driver has set up its queues and runs. @param memory regions of the guest */
export async function run(
  frontend: VhostUserFrontend,
  queues: number,
  memory: readonly { readonly gpa: number; readonly size: number }[] = FRONTEND_MEMORY,
): Promise<void> {
  await frontend.negotiate();
  await frontend.setupMemory(memory);
  await frontend.startQueues(queues);
}

/** Verified requests in all queues. @param requests in each */
export async function exchange({ queues }: VhostUserFrontend, requests: number): Promise<void> {
  await Promise.all(queues.map(({ index, driver }) => new VerifiedDisk(index * BLOCKS).steps(driver, requests)));
}
