import { expect, test } from "bun:test";
import { drainEventfd, eventfd } from "../../src/native/sys.ts";
import { PciCommand, PciConfig } from "../../src/virtio/registers.ts";
import { BlkStatus, readRequest, SECTOR } from "../kit/blk-requests.ts";
import { TestDriver, TestVfs } from "./softvf-driver.ts";

const read = readRequest(0, SECTOR);

test("without the bus master bit nothing is served; with it all goes on", async () => {
  await using vfs = await TestVfs.serve(1, { slow: 3_600_000 });
  await using driver = await TestDriver.start(vfs.vf(0));
  const kept = driver.request(read);
  await Bun.sleep(20);
  await driver.fn.config.write(PciConfig.command, 2, PciCommand.memory);
  const next = driver.request(read);
  await vfs.vf(0).fn.set("slow", 0);
  await Bun.sleep(20);
  expect(driver.queues[0]!.ring.pending).toBe(2);
  driver.queues[0]!.collect();
  expect(driver.queues[0]!.ring.pending).toBe(2);
  await driver.fn.config.write(PciConfig.command, 2, PciCommand.memory | PciCommand.busMaster);
  for (const request of [kept, next]) expect(await request).toMatchObject({ status: BlkStatus.ok });

  // A device may be reset while it is parked.
  await driver.fn.config.write(PciConfig.command, 2, PciCommand.memory);
  await vfs.vf(0).fn.reset();
});

test("a vector that is routed anew is signalled: a call may have gone to where it was routed before", async () => {
  await using vfs = await TestVfs.serve(1);
  await using driver = await TestDriver.start(vfs.vf(0));
  using other = eventfd();
  await driver.fn.interrupts.route(1, other.number);
  expect(drainEventfd(other.number)).toBeGreaterThan(0);
});
