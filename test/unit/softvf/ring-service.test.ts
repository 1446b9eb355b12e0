import { expect, test } from "bun:test";
import { VhostdError } from "../../../src/base/errors.ts";
import type { RingEngine } from "../../../src/native/ring-engine.ts";
import { RingService } from "../../../src/softvf/ring-service.ts";
import type { InternalStatusName } from "../../../src/virtio/admin/vendor.ts";
import { rejection } from "../../kit/rejection.ts";

/** A function whose worker, once it runs, does not let go while `hangs` says so. */
function hanging() {
  const worker = { hangs: false, quiesced: false, serveable: true };
  const engine: Pick<RingEngine, "start" | "park" | "quiesce" | "unquiesce"> = {
    start: () => {},
    park: async () => {
      if (worker.hangs) throw new VhostdError("timedOut", "the piece of I/O");
    },
    quiesce: async () => {
      worker.quiesced = true;
    },
    unquiesce: () => {
      worker.quiesced = false;
    },
  };
  const device = {
    get serveable() {
      return worker.serveable;
    },
    driverFeatures: 0n,
    place: () => ({ size: 0, desc: 0n, driver: 0n, device: 0n }),
    fail: () => {},
    dropped: () => {},
  };
  return { worker, service: new RingService(engine as RingEngine, device) };
}

const steps: [InternalStatusName, InternalStatusName][] = [
  ["quiesced", "running"],
  ["running", "quiesced"],
  ["quiesced", "freezed"],
];
test.each(steps)(
  "a step that fails, from %s to %s, leaves the status and the worker's as they were",
  async (from, to) => {
    const { worker, service } = hanging();
    await service.onDriverOk();
    if (from !== "running") await service.change(from);
    const { quiesced } = worker;
    worker.hangs = true;
    // The driver has taken its rings away, which a hanging worker notices at the next change.
    worker.serveable = false;
    expect(await rejection(service.change(to))).toMatchObject({ code: "timedOut" });
    expect(service.status).toBe(from);
    expect(worker.quiesced).toBe(quiesced);
    worker.hangs = false;
    await service.change(to);
    expect(service.status).toBe(to);
  },
);
