import { expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { drainEventfd, eventfd, signalEventfd } from "../../../src/native/sys.ts";
import { ConfigInterrupt } from "../../../src/virtio/config-interrupt.ts";
import { KillLab } from "./kill-lab.ts";
import { cleanUpAfterEach } from "./vendor-lab.ts";

/** A change of the configuration space is told of whenever the daemon dies. */

cleanUpAfterEach();

const soon = () => Deadline.after(3000, "the test");
const until = (condition: () => boolean) => soon().poll(() => condition() || undefined, 1);

async function running(): Promise<KillLab> {
  const lab = await KillLab.registers();
  await lab.path.start(lab.wanted(), lab.eventfds, soon());
  await lab.checkpoint();
  return lab;
}

test("one that comes while no process is there is told by the next", async () => {
  const lab = await running();
  lab.die();
  lab.fn.routes.set(0, lab.interrupt);
  lab.fn.interruptConfig();
  await lab.succeed();
  await until(() => lab.changes === 1);
});

test("one that a process has noticed before it died is told by the next", async () => {
  const lab = await running();
  lab.life.endsAfter(1);
  lab.fn.interruptConfig();
  await lab.life.died.promise;
  await lab.succeed();
  await until(() => lab.changes === 1);
  await Bun.sleep(1);
  expect(drainEventfd(lab.interrupt)).toBe(0);
});

test("nothing is taken out before somebody listens", async () => {
  const fd = eventfd();
  signalEventfd(fd.number);
  let passed = 0;
  using interrupt = new ConfigInterrupt(fd, async () => void passed++, expect.unreachable);
  await Bun.sleep(5);
  expect(drainEventfd(fd.number)).toBe(1);
  signalEventfd(fd.number);
  interrupt.listen();
  await until(() => passed === 1);
});

test("a process that is told to let go while it passes one on leaves it to the next", async () => {
  const fd = eventfd();
  using left = fd.dup();
  const passing = Promise.withResolvers<void>();
  let begun = false;
  const passOn = async () => {
    begun = true;
    await passing.promise;
  };
  using interrupt = new ConfigInterrupt(fd, passOn, expect.unreachable);
  interrupt.listen();
  signalEventfd(fd.number);
  await until(() => begun);
  interrupt[Symbol.dispose]();
  passing.resolve();
  await Bun.sleep(1);
  expect(drainEventfd(left.number)).toBe(1);
});

test("one that comes while an earlier one is passed on is passed on, too", async () => {
  const fd = eventfd();
  const first = Promise.withResolvers<void>();
  let passed = 0;
  const passOn = async () => {
    passed++;
    if (passed === 1) await first.promise;
  };
  using interrupt = new ConfigInterrupt(fd, passOn, expect.unreachable);
  interrupt.listen();
  signalEventfd(fd.number);
  await until(() => passed === 1);
  signalEventfd(fd.number);
  first.resolve();
  await until(() => passed === 2);
});

test("what fails is reported once, and the next one is passed on", async () => {
  const fd = eventfd();
  const errors: string[] = [];
  let passed = 0;
  const passOn = async () => {
    if (passed++ === 0) throw new Error("nobody at home");
  };
  using interrupt = new ConfigInterrupt(fd, passOn, ({ message }) => errors.push(message));
  interrupt.listen();
  signalEventfd(fd.number);
  await until(() => errors.length === 1);
  signalEventfd(fd.number);
  await until(() => passed === 2);
  expect(errors).toEqual(["nobody at home"]);
});
