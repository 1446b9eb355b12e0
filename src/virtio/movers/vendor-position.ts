import { VhostdError } from "../../base/errors.ts";
import type { DeviceClass } from "../../plugin.ts";
import { withoutReceived } from "../admin/vendor-state.ts";
import { comparedBytes } from "../config-space.ts";
import type { DeviceState } from "../device-state.ts";
import { compare, decodeDeviceState, encodeDeviceState } from "../device-state-codec.ts";
import type { MoverSnapshot } from "../mover.ts";

/**
 * Where a VF is that its PF moves. `frozen`: freezed, with the state that it had then. `prepared`: the same, with one that
 * it was given and never ran with. `standby`: the same, with none. `starting`: on the way to running.
 */
export type Position =
  | { readonly kind: "reset" | "standby" }
  | { readonly kind: "prepared" | "starting" | "running" | "frozen"; readonly state: DeviceState };

/** One that stands by or was prepared is reset by the next process. */
export function snapshotOf(position: Position): MoverSnapshot {
  if (position.kind === "starting" || position.kind === "running" || position.kind === "frozen") {
    return { kind: position.kind, state: encodeDeviceState(position.state) };
  }
  return { kind: "reset" };
}

/** @throws VhostdError invalid */
export function positionOf(snapshot: MoverSnapshot): Position {
  return snapshot.kind === "reset"
    ? { kind: "reset" }
    : { kind: snapshot.kind, state: decodeDeviceState(snapshot.state) };
}

/** Both states are one, but for what of the configuration space does not matter with the features of the second. */
export function isSame(a: DeviceState, b: DeviceState, deviceClass: DeviceClass): boolean {
  const relevant = (one: DeviceState) => ({ ...one, config: comparedBytes(deviceClass, b.features, one.config) });
  return compare(relevant(a), relevant(b)).length === 0;
}

/**
 * The configuration space is the device's own matter, and so is what it takes of a receive queue.
 * @throws VhostdError io where a device that stood still has moved all the same
 */
export function checkStood(name: string, stood: DeviceState, seen: DeviceState, deviceClass: DeviceClass): void {
  const before = withoutReceived(stood, deviceClass);
  const moved = compare({ ...withoutReceived(seen, deviceClass), config: before.config }, before);
  if (moved.length === 0) return;
  throw new VhostdError("io", `${name} went on while it was stopped: ${moved.join("; ")}`, {
    fix: "restart the guest's driver (reboot the guest)",
  });
}
