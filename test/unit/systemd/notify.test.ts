import { afterEach, expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { silentLogger } from "../../../src/base/log.ts";
import { liveFds, pendingCloses } from "../../../src/native/fd.ts";
import { Notify } from "../../../src/systemd/notify.ts";
import { NotifySocket } from "../../../src/systemd/notify-socket.ts";
import { type ServiceEnvironment, takeServiceEnvironment } from "../../../src/systemd/service-environment.ts";
import { FakeSystemd } from "../../kit/fake-systemd.ts";
import { rejection } from "../../kit/rejection.ts";

const soon = () => Deadline.after(5_000, "the test");

afterEach(async () => {
  await soon().poll(() => (liveFds() === 0 && pendingCloses() === 0) || undefined, 1);
});

function environment(parts: Partial<ServiceEnvironment>): ServiceEnvironment {
  return { notifySocket: undefined, watchdog: undefined, fdStoreMax: undefined, listenNames: [], ...parts };
}

/** A logger that notes its warnings. */
function listening(): { log: typeof silentLogger; warnings: string[] } {
  const warnings: string[] = [];
  return { log: { ...silentLogger, warn: (message) => warnings.push(message) }, warnings };
}

test("the variables are read and taken away", () => {
  const variables: Record<string, string | undefined> = {
    NOTIFY_SOCKET: "/run/notify",
    WATCHDOG_USEC: "3000000",
    WATCHDOG_PID: "12",
    FDSTORE: "500",
    LISTEN_PID: "12",
    LISTEN_FDS: "2",
    LISTEN_FDNAMES: "a:b",
    PATH: "/bin",
  };
  expect(takeServiceEnvironment({ ...variables, WATCHDOG_PID: undefined }, 13)).toEqual(
    environment({ notifySocket: "/run/notify", watchdog: 3000, fdStoreMax: 500 }),
  );
  expect(takeServiceEnvironment(variables, 12)).toEqual({
    notifySocket: "/run/notify",
    watchdog: 3000,
    fdStoreMax: 500,
    listenNames: ["a", "b"],
  });
  expect(variables).toEqual({ PATH: "/bin" });
  expect(takeServiceEnvironment(variables, 12)).toEqual(environment({}));
});

test("what is meant for another process is not taken for ours", () => {
  const variables = {
    WATCHDOG_USEC: "3000000",
    WATCHDOG_PID: "12",
    LISTEN_PID: "12",
    LISTEN_FDS: "1",
    LISTEN_FDNAMES: "a",
  };
  expect(takeServiceEnvironment(variables, 13)).toEqual(environment({}));
  expect(takeServiceEnvironment({ WATCHDOG_USEC: "infinity", FDSTORE: "-1" }, 13)).toEqual(environment({}));
});

test.each(["path", "abstract"] as const)("systemd is told, by a socket that is a %s", async (place) => {
  using systemd = new FakeSystemd({ place });
  using notify = new Notify(environment({ notifySocket: systemd.address }), silentLogger);
  notify.status("one\ntwo");
  notify.ready("3 VFs");
  notify.ready();
  notify.stopping();
  await soon().poll(() => systemd.notified.length === 4 || undefined, 1);
  expect(systemd.notified).toEqual(["STATUS=one two", "READY=1\nSTATUS=3 VFs", "READY=1", "STOPPING=1"]);
});

test("nobody is told where nobody asked", () => {
  const { log, warnings } = listening();
  using notify = new Notify(environment({ watchdog: 1 }), log);
  notify.ready();
  notify.stopping();
  expect(warnings).toEqual([]);
});

test("a service manager that is not there, or goes, does no harm", async () => {
  const { log, warnings } = listening();
  using systemd = new FakeSystemd();
  using left = new Notify(environment({ notifySocket: systemd.address }), log);
  systemd[Symbol.dispose]();
  using lone = new Notify(environment({ notifySocket: systemd.address }), log);
  expect(warnings).toEqual(["systemd cannot be notified"]);
  lone.ready();
  left.ready();
  await soon().poll(() => warnings.length === 2 || undefined, 1);
  expect(warnings[1]).toBe("systemd was not notified");
});

test("signs of life come again and again, until the end", async () => {
  using systemd = new FakeSystemd();
  const { log, warnings } = listening();
  {
    using _notify = new Notify(environment({ notifySocket: systemd.address, watchdog: 4 }), log);
    await soon().poll(() => systemd.notified.length > 2 || undefined, 1);
  }
  // One that went on would not find its socket.
  await Bun.sleep(20);
  expect(warnings).toEqual([]);
  expect(new Set(systemd.notified)).toEqual(new Set(["WATCHDOG=1"]));
});

test("messages wait for room, in their order", async () => {
  using systemd = new FakeSystemd();
  systemd.pause();
  using socket = new NotifySocket(systemd.address);
  const fields = Array.from({ length: 2000 }, (_, index) => `X_NUMBER=${index}`);
  const sent = Promise.all(fields.map((field) => socket.send([field], [], soon())));
  const late = rejection(socket.send(["X_NUMBER=late"], [], Deadline.after(20, "that one")));
  // Behind those that have no room yet, it is not sent at all.
  await Bun.sleep(30);
  systemd.resume();
  await sent;
  expect(await late).toMatchObject({ code: "timedOut" });
  const { passed } = await socket.sendBarrier(soon());
  await passed;
  expect(systemd.notified).toEqual(fields);
  expect(systemd.journal).toEqual(["barrier"]);
});

test("a barrier that is not come to is waited for no longer than the deadline", async () => {
  using systemd = new FakeSystemd();
  systemd.pause();
  using socket = new NotifySocket(systemd.address);
  const { passed } = await socket.sendBarrier(Deadline.after(10, "the barrier"));
  expect(await rejection(passed)).toMatchObject({ code: "timedOut" });
});
