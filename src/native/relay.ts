import { checkFd, checkInteger } from "./arguments.ts";
import { addon, check } from "./load.ts";
import type { Mapping } from "./mmio.ts";
import { onStop } from "./stop.ts";

/** Where a kick goes. `offset` in bytes, a multiple of `width`; the eventfd is borrowed for the call. */
export type RelayTarget =
  | { readonly eventfd: number }
  | { readonly mapping: Mapping; readonly offset: number; readonly width: 2 | 4; readonly value: number };

let running = false;

/**
 * From now on each signal of `kick` rings the doorbell, on a thread of its own that never enters JavaScript: an eventfd
 * gets 1 added, a place in a mapping gets `value` written. A kick that is signalled already rings at once. `kick` is
 * never read, so its counter only grows; a peer cannot make the relay wait, with neither fd.
 *
 * When disposal returns the relay is done with the fds and the mapping. Where the memory behind a mapping vanished, the
 * connection falls silent.
 * @throws SystemError EPERM where `kick` is nothing that can be waited for
 */
export function relayKick(kick: number, to: RelayTarget): Disposable {
  checkFd(kick);
  if (!running) {
    check(addon.relayStart(), "start the relay");
    running = true;
    onStop(stop);
  }
  if ("eventfd" in to) {
    return disconnecting(check(addon.relayToEventfd(kick, checkFd(to.eventfd)), "relay a kick to an eventfd"));
  }
  checkInteger(to.value, 0, 2 ** (8 * to.width) - 1, "value of a doorbell");
  const lent = to.mapping.lend(to.offset, to.width);
  const result = addon.relayToAddress(kick, lent.address, to.width, to.value);
  if (result < 0) lent.release();
  return disconnecting(check(result, "relay a kick to a doorbell"), lent);
}

function disconnecting(connection: number, lent?: { release(): void }): Disposable {
  let connected = true;
  return {
    [Symbol.dispose]() {
      if (!connected) return;
      connected = false;
      // Before the memory goes: this returns when the thread is done with it.
      addon.relayDisconnect(connection);
      lent?.release();
    },
  };
}

function stop(): void {
  addon.relayStop();
  running = false;
}
