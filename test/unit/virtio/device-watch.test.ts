import { expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { type DeviceFailure, DeviceWatch } from "../../../src/virtio/device-watch.ts";
import { Status } from "../../../src/virtio/features.ts";
import { VirtioPciDevice } from "../../../src/virtio/pci-device.ts";
import { FakeFunction } from "../../kit/fake-function.ts";

const soon = () => Deadline.after(2000, "the test");

/** A device that runs, looked at every millisecond. */
async function watched() {
  const fn = new FakeFunction();
  const device = await VirtioPciDevice.probe(fn, soon());
  fn.status = Status.driverOk;
  const state = { running: true };
  const watch = new DeviceWatch(device, () => state.running, 1);
  const failures: DeviceFailure[] = [];
  watch.onFailure((failure) => failures.push(failure));
  const failed = () => soon().poll(() => failures[0], 1);
  return { fn, state, watch, failures, failed, [Symbol.dispose]: () => watch[Symbol.dispose]() };
}

test("a device that was reset behind its driver's back is gone", async () => {
  using one = await watched();
  one.fn.status = 0;
  expect(await one.failed()).toMatchObject({ gone: true, error: { message: expect.stringMatching(/fell to 0/) } });
});

test("a device that asks for a reset is heard without its interrupt, once each time that it asks", async () => {
  using one = await watched();
  const asking = Status.driverOk | Status.needsReset;
  one.fn.status = asking;
  expect(await one.failed()).toMatchObject({
    gone: false,
    error: { message: expect.stringMatching(/asks for a reset/) },
  });
  expect(one.watch.asksForReset(asking)).toBe(true);
  await Bun.sleep(20);
  expect(one.failures).toHaveLength(1);
  expect(one.watch.asksForReset(Status.driverOk)).toBe(false);
  expect(one.watch.asksForReset(asking)).toBe(true);
  expect(one.failures).toHaveLength(2);
  one.watch.change()[Symbol.dispose]();
  expect(one.watch.asksForReset(asking)).toBe(true);
  expect(one.failures).toHaveLength(3);
});

test("a device that does not answer is gone, and says so to who asks later", async () => {
  using one = await watched();
  one.fn.faults.silent = true;
  expect(await one.failed()).toMatchObject({ gone: true, error: { code: "noDevice" } });
  const late: DeviceFailure[] = [];
  one.watch.onFailure((failure) => late.push(failure));
  await soon().poll(() => late[0], 1);
});

test("a device that is being changed, or does not run, may have any status", async () => {
  using one = await watched();
  {
    using _change = one.watch.change();
    one.fn.status = 0;
    await Bun.sleep(20);
    one.state.running = false;
  }
  await Bun.sleep(20);
  expect(one.failures).toEqual([]);
  using _next = one.watch.change();
  one.state.running = true;
});
