import { afterEach, beforeEach, expect } from "bun:test";
import { readdirSync } from "node:fs";
import { c } from "../../../src/native/load.ts";
import { watch } from "../../../src/native/poller.ts";
import { relayKick } from "../../../src/native/relay.ts";
import { RingEngine } from "../../../src/native/ring-engine.ts";
import { eventfd, signalEventfd } from "../../../src/native/sys.ts";

/** The count of fds that this process has open, when those disposed of so far are closed. */
export function openFds(): number {
  // One whose worker does not end at once ends behind the scenes.
  for (const end = performance.now() + 5000; RingEngine.ending() > 0 && performance.now() < end; ) Bun.sleepSync(1);
  expect(c.vhostd_wait_for_closes(5000)).toBe(1);
  return readdirSync("/proc/self/fd").length;
}

/** What stays open as long as the process lives is opened now: threads and the file that signals are made with. */
export function warmUp(): void {
  using fd = eventfd();
  signalEventfd(fd.number);
  watch(fd.number, "in", () => {})[Symbol.dispose]();
  relayKick(fd.number, { eventfd: fd.number })[Symbol.dispose]();
}

/** Until `holds()`; false after five seconds. */
export async function eventually(holds: () => boolean): Promise<boolean> {
  const end = performance.now() + 5000;
  while (performance.now() < end) {
    if (holds()) return true;
    await Bun.sleep(1);
  }
  return false;
}

/** Each test of the file leaves as many fds open as there were before it. */
export function holdFds(): void {
  let before = 0;
  beforeEach(() => {
    warmUp();
    before = openFds();
  });
  afterEach(() => {
    warmUp();
    expect(openFds()).toBe(before);
  });
}
