import { createInterface } from "node:readline";
import { Mapping } from "../../../src/native/mmio.ts";
import { pread, pwrite } from "../../../src/native/sys.ts";
import { VRING_AREA } from "../../../src/vhost-user/messages.ts";
import { PciCommand, PciConfig } from "../../../src/virtio/registers.ts";
import { VhostUserFrontend } from "../frontend/frontend.ts";
import { VerifiedDisk } from "../verified-disk.ts";
import type { Kept } from "./former-frontend.ts";
import { FRONTEND_MEMORY } from "./frontend-process.ts";
import { givenDoorbells, HostNotifiers } from "./host-notifier.ts";

/**
 * `bun former-program.ts SOCKET QUEUES fd|mapping`: a VMM whose guest reads and writes its disk, and which lets go of all
 * but one thing when its session ends: the fd that came with the doorbells, or a mapping of one. Told what to do on its
 * standard input (FormerFrontend); does not end by itself.
 */
const [socket = "", queues = "1", kept = "fd" as Kept] = process.argv.slice(2);
/** Where vfio-pci has a function's configuration space in its file: region 7, and each has 2^40 bytes. */
const CONFIG_SPACE = 7 * 2 ** 40;

const frontend = VhostUserFrontend.connect(socket);
await frontend.negotiate();
await frontend.setupMemory(FRONTEND_MEMORY);
await frontend.startQueues(Number(queues));
{
  using _doorbells = await HostNotifiers.use(frontend);
  for (const { index, driver } of frontend.queues) await new VerifiedDisk(index * 256).steps(driver, 10);
}
const [first] = givenDoorbells(frontend);
const { offset, size } = VRING_AREA.read(first!.payload);
const device = first!.fds[0]!.dup();
const mapping = kept === "mapping" ? Mapping.map(device.number, offset, size, "read-write") : undefined;
if (mapping !== undefined) device[Symbol.dispose]();

const orders: Readonly<Record<string, () => void>> = {
  "end session": () => frontend[Symbol.dispose](),
  "master bus": () => {
    const command = new Uint8Array(1);
    pread(device.number, command, CONFIG_SPACE + PciConfig.command);
    pwrite(device.number, Uint8Array.of(command[0]! | PciCommand.busMaster), CONFIG_SPACE + PciConfig.command);
  },
  "let go": () => {
    mapping?.[Symbol.dispose]();
    device[Symbol.dispose]();
  },
};
void frontend.hungUp().then(
  () => {
    frontend[Symbol.dispose]();
    console.log("hung up");
  },
  () => {},
);
console.log("running");
for await (const line of createInterface({ input: process.stdin })) {
  orders[line]?.();
  console.log(`done: ${line}`);
}
