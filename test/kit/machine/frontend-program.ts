import { slowIoctl } from "../../../src/native/slow.ts";
import { DeviceRequest } from "../../../src/pci/vfio/device-uapi.ts";
import { VhostUserFrontend } from "../frontend/frontend.ts";
import { VerifiedDisk } from "../verified-disk.ts";
import { FRONTEND_MEMORY, type RunningFrontend } from "./frontend-process.ts";
import { givenDoorbells, HostNotifiers } from "./host-notifier.ts";

/**
 * `bun frontend-program.ts SOCKET QUEUES DEPTH [doorbells|resets]`: a VMM with a guest that reads and writes its disk without an
 * end, QUEUES times DEPTH requests at a time. With "doorbells" the guest rings those of the function itself. Ends when the
 * back-end hangs up, or a request goes wrong. With "resets" it then resets the function again and again, by the fd that came
 * with its doorbells, and does not end.
 */
const [socket = "", queues = "1", depth = "1", mode] = process.argv.slice(2);
/** Blocks of each queue's part of the disk. */
const BLOCKS = 256;

const frontend = VhostUserFrontend.connect(socket);
await frontend.negotiate();
await frontend.setupMemory(FRONTEND_MEMORY);
await frontend.startQueues(Number(queues));
if (mode !== undefined) await HostNotifiers.use(frontend);
const running = frontend.queues.map(({ index, driver }) =>
  new VerifiedDisk(index * BLOCKS, BLOCKS).runOn(driver, Number(depth)),
);
for (const io of running) await io.progress(1);
const { file } = frontend.memory.regions.at(-1)!;
const told: RunningFrontend = {
  memory: { fd: file.file.number, gpa: file.gpa },
  rings: frontend.queues.map(({ driver: { ring } }) => ({ driver: ring.driver, device: ring.device })),
};
console.log(`running ${JSON.stringify(told)}`);
if (mode === "resets") {
  const device = givenDoorbells(frontend)[0]!.fds[0]!;
  for (let count = 1; ; count++) {
    // Refused for a moment where somebody else resets it.
    await slowIoctl(device.number, DeviceRequest.reset, 0).catch(() => {});
    console.log(`reset ${count}`);
  }
}
while ((await frontend.channel.receive()) !== undefined);
console.log("hung up");
process.exit(0);
