import type { OwnedFd } from "../../../src/native/fd.ts";
import { memfd, pread, pwrite } from "../../../src/native/sys.ts";
import { LogMemory } from "../../../src/virtio/admin/log-memory.ts";
import { TRACKING_FEATURE, type TrackingModeName } from "../../../src/virtio/admin/vendor.ts";
import { LOG_PAGE, type Tracking } from "../../../src/virtio/dirty-log.ts";
import { FeatureBit, featureBits } from "../../../src/virtio/features.ts";
import { VendorMover } from "../../../src/virtio/movers/vendor.ts";
import { FakeAdmin } from "../../kit/fake-admin.ts";
import { FakeFunction } from "../../kit/fake-function.ts";
import { moverHost } from "./mover-host.ts";
import { FakeRings, wantedState } from "./states.ts";
import { disposeLater, soon } from "./vendor-lab.ts";

/** What the tests of dirty tracking have in common: VFs of a PF that has some modes, and logs of a front-end. */

/** A front-end's log, as QEMU makes it: a file of its own, of a multiple of 8 bytes. */
export class FrontEndLog implements AsyncDisposable {
  readonly file: OwnedFd;

  /** @param pages that it has bits for */
  constructor(
    readonly pages: number,
    readonly offset = 0,
  ) {
    this.file = memfd("dirty-log", offset + this.size);
    disposeLater(this);
  }

  get size(): number {
    return Math.ceil(this.pages / 64) * 8;
  }

  /** @param pages below the end of guest memory */
  tracking(pages = this.pages): Tracking {
    return { log: { fd: this.file.number, offset: this.offset, size: this.size }, end: pages * LOG_PAGE };
  }

  /** Pages that are marked; all are clear afterwards. */
  take(): number[] {
    const bytes = new Uint8Array(this.size);
    pread(this.file.number, bytes, this.offset);
    pwrite(this.file.number, new Uint8Array(this.size), this.offset);
    const bits = [0, 1, 2, 3, 4, 5, 6, 7];
    return [...bytes].flatMap((byte, at) => bits.flatMap((bit) => ((byte >> bit) & 1 ? [8 * at + bit] : [])));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.file[Symbol.dispose]();
  }
}

export const allPages = (pages: number) => Array.from({ length: pages }, (_, page) => page);

/** A PF that has these modes, and `vfs` VFs of it, each with a mover that has not tried anything. */
export async function setUpTracking(modes: readonly TrackingModeName[], vfs = 1) {
  const bits = modes.map((mode) => TRACKING_FEATURE[mode]);
  const pf = new FakeAdmin({ features: featureBits(FeatureBit.accessPlatform, FeatureBit.adminVq, ...bits), vfs });
  disposeLater(pf);
  const found = await pf.discover();
  if (found.kind === "none") throw new Error(found.reason);
  const memory = new LogMemory(pf.domain);
  const notices: string[] = [];
  const tracking = { modes: found.tracking, memory, log: (text: string) => void notices.push(text) };
  const movers = await Promise.all(
    pf.vfs.map(async (vf, index) => {
      const fn = new FakeFunction({ queues: 2, features: featureBits(6), config: new Uint8Array(60) });
      vf.fn = fn;
      const managed = { admin: found.admin, vdevId: index + 1, tracking };
      const host = await moverHost(fn);
      const mover = new VendorMover(host, managed);
      disposeLater({ [Symbol.asyncDispose]: async () => mover.abandon() });
      return { mover, host, managed, fn, vf };
    }),
  );
  return { pf, admin: found.admin, memory, notices, movers, ...movers[0]!, rings: new FakeRings() };
}

/** The same, proven and running. */
export async function runningTracked(modes: readonly TrackingModeName[], vfs = 1) {
  const parts = await setUpTracking(modes, vfs);
  for (const { mover } of parts.movers) {
    await mover.prove(soon());
    await mover.configure(wantedState(1), soon());
  }
  parts.pf.seen.length = 0;
  return parts;
}
