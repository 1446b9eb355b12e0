import { expect, test } from "bun:test";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { RpcClient } from "../../src/rpc/client.ts";
import { controlSocket } from "../../src/softvf/config.ts";
import { BackendRequest } from "../../src/vhost-user/messages.ts";
import { HaLab } from "../kit/ha-lab.ts";

const MIB = 1 << 20;
const SECTOR = 512;

async function resize(lab: HaLab, size: number): Promise<void> {
  const deadline = Deadline.after(10_000, "the new size");
  using client = await RpcClient.connect(controlSocket(join(lab.directory, "softvf")), deadline);
  await client.call("set", { address: lab.vfAt(0), options: { size } }, deadline);
}

test("a disk that grows while no daemon is there: the next one tells the front-end, and is silent otherwise", async () => {
  await using lab = await HaLab.create({ vfs: 1 });
  await lab.startDaemon();
  await lab.addPf();
  const { listener, frontend } = await lab.connect();
  using _ = listener;
  using _frontend = frontend;
  await frontend.negotiate();
  await frontend.setupMemory([{ gpa: 0, size: 16 * MIB }]);
  await frontend.startQueues(1);
  const changes = () =>
    frontend.backendRequests!.received.filter(({ request }) => request === BackendRequest.CONFIG_CHANGE_MSG).length;
  const capacity = async () => Buffer.from((await frontend.getConfig(0, 8))!).readBigUInt64LE();
  expect(await capacity()).toBe(BigInt((64 * MIB) / SECTOR));

  await lab.daemon.kill();
  await resize(lab, 128 * MIB);
  await lab.startDaemon();
  await lab.takenUp();
  const told = Deadline.after(10_000, "CONFIG_CHANGE_MSG");
  await told.poll(() => changes() === 1 || undefined, 5);
  expect(await capacity()).toBe(BigInt((128 * MIB) / SECTOR));

  await lab.replaceDaemon();
  await lab.takenUp();
  expect(await capacity()).toBe(BigInt((128 * MIB) / SECTOR));
  expect(changes()).toBe(1);
}, 60_000);
