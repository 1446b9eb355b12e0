/** The way of a doorbell and of an interrupt: eventfds, the relay thread, the poller's way into JavaScript. */
import { bench, run } from "mitata";
import { watch } from "../../src/native/poller.ts";
import { relayKick } from "../../src/native/relay.ts";
import { stopNative } from "../../src/native/stop.ts";
import { drainEventfd, eventfd, signalEventfd } from "../../src/native/sys.ts";

using kick = eventfd();
using doorbell = eventfd();
using interrupt = eventfd();

let rung = Promise.withResolvers<void>();
function wakeOn(fd: number): Disposable {
  const watched = watch(fd, "in", () => {
    drainEventfd(fd);
    watched.rearm();
    rung.resolve();
  });
  return watched;
}

using _relay = relayKick(kick.number, { eventfd: doorbell.number });
using _onDoorbell = wakeOn(doorbell.number);
using _onInterrupt = wakeOn(interrupt.number);

async function roundTrip(fd: number): Promise<void> {
  rung = Promise.withResolvers<void>();
  signalEventfd(fd);
  await rung.promise;
}

bench("eventfd signalled and drained, one thread", () => {
  signalEventfd(interrupt.number);
  drainEventfd(interrupt.number);
});
bench("interrupt: eventfd to JavaScript", () => roundTrip(interrupt.number));
bench("doorbell: kick eventfd, relay, doorbell eventfd, JavaScript", () => roundTrip(kick.number));
await run();
stopNative();
