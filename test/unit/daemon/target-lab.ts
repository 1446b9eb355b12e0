import type { Logger } from "../../../src/base/log.ts";
import { OperationQueue } from "../../../src/base/operation-queue.ts";
import { DEADLINES } from "../../../src/daemon/deadlines.ts";
import { OpenRings } from "../../../src/daemon/open-rings.ts";
import { Patience } from "../../../src/daemon/patience.ts";
import type { VfParts } from "../../../src/daemon/vf-parts.ts";
import type { VfState } from "../../../src/daemon/vf-state.ts";
import { type TargetHost, VfTarget } from "../../../src/daemon/vf-target.ts";
import type { TrackingModeName } from "../../../src/virtio/admin/vendor.ts";
import { DataPath } from "../../../src/virtio/data-path.ts";
import { LOG_PAGE } from "../../../src/virtio/dirty-log.ts";
import { VendorMover } from "../../../src/virtio/movers/vendor.ts";
import { fakeClass } from "../../kit/fake-class.ts";
import { setUpTracking } from "../virtio/tracking-lab.ts";
import { disposeLater, soon } from "../virtio/vendor-lab.ts";

/** What a session may do with a VF whose PF marks pages in the front-end's log itself. */
export async function makeTarget(modes: readonly TrackingModeName[] = ["pushBitmap"]) {
  const parts = await setUpTracking(modes);
  const events: (string | undefined)[] = [];
  /** All that was logged. */
  const lines: string[] = [];
  const { fn, managed } = parts;
  const deviceClass = fakeClass();
  const dataPath = await DataPath.open(
    fn,
    () => deviceClass,
    soon(),
    (host, snapshot) => new VendorMover(host, managed, snapshot),
  );
  disposeLater({ [Symbol.asyncDispose]: async () => dataPath.abandon() });
  let state: VfState = { name: "idle" };
  const standBys = new OperationQueue();
  const entry = {
    directory: "the fake",
    transport: { kind: "vfio-user", socket: "vfio-user.sock" },
  } as VfParts["entry"];
  const host = {
    options: { address: fn.address, socket: "/run/vm.sock", mode: "server" },
    parts: {
      ...{ entry, fn, dataPath, deviceClass, config: new Uint8Array(0) },
      mover: { make: undefined, unmanagedReason: () => "its PF has no admin queue", standBys },
    } as Partial<VfParts> as VfParts,
    memory: { end: 100 * LOG_PAGE },
    deadlines: { ...DEADLINES, reset: 200 },
    log: loggerTo(lines),
    rings: new OpenRings(deviceClass),
    patience: new Patience(DEADLINES.lastDrain),
    operations: new OperationQueue(),
    state: () => state,
    become: (next: VfState) => {
      state = next;
    },
    checkUsable: () => {},
    fail: (error: Error) => {
      state = { name: "failed", reason: error.message };
    },
    onRunning: async () => {},
    beforeReset: async () => {},
    beforeEnd: async () => {},
    checkpoint: async () => {},
    deliver: () => undefined,
    onReset: () => {},
    onMigration: () => void events.push(target.migration.info?.state),
    peer: () => 7,
  };
  const target = new VfTarget(host as object as TargetHost);
  disposeLater({ [Symbol.asyncDispose]: async () => target.abandon() });
  const { operations, become, fail } = host;
  return { ...parts, dataPath, target, events, lines, operations, standBys, become, fail };
}

function loggerTo(lines: string[]): Logger {
  const write = (level: string) => (message: string) => void lines.push(`${level}: ${message}`);
  const log: Logger = {
    error: write("error"),
    warn: write("warn"),
    info: write("info"),
    debug: write("debug"),
    child: () => log,
  };
  return log;
}
