import { VhostdError } from "../base/errors.ts";
import type { OwnedFd } from "../native/fd.ts";
import { eventfd } from "../native/sys.ts";
import type { Backend } from "./backend.ts";
import {
  type PayloadOf,
  type U64,
  type VRING_ADDR,
  VRING_ADDR_LOG,
  VRING_INDEX_MASK,
  VRING_NO_FD,
  type VRING_STATE,
} from "./messages.ts";
import { checkEventfd, type Ring, type RingFd } from "./rings.ts";

/** Handlers of the messages about one ring. */

type VringState = PayloadOf<typeof VRING_STATE>;

/** SET_VRING_NUM. */
export async function setRingSize(backend: Backend, { index, num }: VringState): Promise<void> {
  const ring = backend.ring(index);
  await backend.beginSetUp();
  if (backend.runs(ring)) return unchanged(ring, "size", ring.size, num);
  ring.setSize(num);
}

/** SET_VRING_BASE. */
export async function setRingBase(backend: Backend, { index, num }: VringState): Promise<void> {
  const ring = backend.ring(index);
  if (num > 0xffff) throw new VhostdError("protocol", `base of ring ${index} is ${num}, at most 65535`);
  await backend.beginSetUp();
  if (backend.runs(ring)) return unchanged(ring, "base", ring.base, num);
  ring.base = num;
}

/** SET_VRING_ADDR. On a running ring only its log flag may have changed: that is not a new set-up. */
export async function setRingAddresses(backend: Backend, addresses: PayloadOf<typeof VRING_ADDR>): Promise<void> {
  const ring = backend.ring(addresses.index);
  await backend.beginSetUp();
  const resolved = ring.resolve(addresses, backend.memory);
  if ((addresses.flags & VRING_ADDR_LOG) !== 0 && addresses.log !== BigInt(resolved.device)) {
    // Pages are marked where the device writes. A VMM that means another place migrates all the same.
    backend.chatter.warn(
      `the used ring of ring ${ring.index} is to be logged at 0x${addresses.log.toString(16)}, ` +
        `it is logged where it is, 0x${resolved.device.toString(16)}`,
    );
  }
  if (!backend.runs(ring)) {
    ring.addresses = resolved;
    return;
  }
  for (const part of ["desc", "driver", "device"] as const) {
    unchanged(ring, `${part} address`, ring.addresses?.[part] ?? 0, resolved[part]);
  }
}

/** SET_VRING_ENABLE: before features and memory too, and for rings that are never set up. */
export async function setRingEnabled(backend: Backend, { index, num }: VringState): Promise<void> {
  const ring = backend.ring(index);
  if (num > 1) throw new VhostdError("protocol", `enable of ring ${index} is ${num}, must be 0 or 1`);
  await backend.enable(ring, num === 1);
}

/** SET_VRING_KICK, CALL and ERR. */
export function setRingFd(which: RingFd) {
  return async (backend: Backend, { value }: PayloadOf<typeof U64>, fds: OwnedFd[]): Promise<void> => {
    const ring = backend.ring(Number(value & VRING_INDEX_MASK));
    const expected = (value & VRING_NO_FD) === 0n ? 1 : 0;
    if (value > (VRING_INDEX_MASK | VRING_NO_FD) || fds.length !== expected) {
      throw new VhostdError(
        "protocol",
        `${which} of ring ${ring.index}: 0x${value.toString(16)} comes with ${fds.length} fds, must be ${expected}`,
      );
    }
    const [fd] = fds;
    if (fd !== undefined) checkEventfd(fd, `${which} fd of ring ${ring.index}`);
    // A kick that nobody rings is as good as none, and a ring that is started has one: without it a record is damaged.
    await backend.setRingFd(ring, which, fds.shift() ?? (which === "kick" ? eventfd() : undefined));
  };
}

function unchanged(ring: Ring, what: string, before: number, now: number): void {
  if (before === now) return;
  throw new VhostdError(
    "protocol",
    `${what} of ring ${ring.index} is 0x${now.toString(16)}, but the ring runs with 0x${before.toString(16)}`,
  );
}
