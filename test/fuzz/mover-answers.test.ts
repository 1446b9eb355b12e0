import { expect, test } from "bun:test";
import fc from "fast-check";
import { VhostdError } from "../../src/base/errors.ts";
import { encodeState, type VendorState } from "../../src/virtio/admin/state-blob.ts";
import { TRACKING_MODES } from "../../src/virtio/admin/vendor.ts";
import type { FakeAnswer } from "../kit/fake-admin.ts";
import { FUZZ_TIMEOUT, fuzz } from "../kit/fuzz.ts";
import { wantedState } from "../unit/virtio/states.ts";
import { FrontEndLog, setUpTracking } from "../unit/virtio/tracking-lab.ts";
import { disposeAll, running, soon } from "../unit/virtio/vendor-lab.ts";

/** What a device answers that lies: the mover says what is wrong with it, and waits for nothing in vain. */

/** Milliseconds of an operation of the mover. */
const OPERATION = 80;
const QUEUES = 2;

/** Resolves whether it went well; anything but an error with a reason is a mistake of ours. */
async function tried(operation: Promise<unknown>): Promise<boolean> {
  try {
    await operation;
    return true;
  } catch (error) {
    if (!(error instanceof VhostdError)) throw error;
    expect(error.message).toMatch(/.+/);
    return false;
  }
}

const u16 = fc.oneof(fc.constantFrom(0, 1, QUEUES, 63, 64, 0x7fff, 0xffff), fc.nat(0xffff));
const pick = fc.nat(0xffff);

/** A field of the blob as it is saved is written anew, moved, doubled or left out; or the blob is cut or padded. */
const blobChange = fc.oneof(
  fc.record({ kind: fc.constantFrom("swap", "double", "drop"), field: pick, other: pick }),
  fc.record({ kind: fc.constant("size"), field: pick, size: fc.constantFrom(0, 1, 4, 6, 37, 39, 0x7fff_ffff) }),
  fc.record({ kind: fc.constant("type"), field: pick, type: fc.constantFrom(0, 1, 2, 3, 5, 8, 9, 0xffff_ffff) }),
  fc.record({ kind: fc.constant("word"), field: pick, at: pick, value: u16 }),
  fc.record({ kind: fc.constant("count"), count: fc.constantFrom(0, 1, 8191, 8193, 0xffff_ffff) }),
  fc.record({ kind: fc.constant("length"), length: fc.constantFrom(0, 1, 4, 100, 4096, 70_000) }),
);
type BlobChange = typeof blobChange extends fc.Arbitrary<infer T> ? T : never;

interface Field {
  type: number;
  size: number;
  bytes: Uint8Array;
}

function fieldsOf(blob: Uint8Array): Field[] {
  const view = new DataView(blob.buffer, blob.byteOffset);
  const fields: Field[] = [];
  for (let at = 4; fields.length < view.getUint32(0, true); ) {
    const size = view.getUint32(at + 4, true);
    fields.push({ type: view.getUint32(at, true), size, bytes: blob.slice(at + 8, at + 8 + size) });
    at += 8 + size;
  }
  return fields;
}

function changed(state: VendorState, changes: readonly BlobChange[]): Uint8Array {
  const fields = fieldsOf(encodeState(state));
  let count: number | undefined;
  let length: number | undefined;
  for (const change of changes) {
    if (change.kind === "count") count = change.count;
    else if (change.kind === "length") length = change.length;
    else if (fields.length > 0) changeField(fields, change);
  }
  const parts = fields.flatMap(({ type, size, bytes }) => [new Uint8Array(Uint32Array.of(type, size).buffer), bytes]);
  const head = new Uint8Array(Uint32Array.of(count ?? fields.length).buffer);
  const whole = new Uint8Array(Buffer.concat([head, ...parts]));
  const blob = new Uint8Array(length ?? Math.ceil(whole.length / 4096) * 4096);
  blob.set(whole.subarray(0, blob.length));
  return blob;
}

function changeField(fields: Field[], change: Exclude<BlobChange, { kind: "count" | "length" }>): void {
  const at = change.field % fields.length;
  const field = fields[at]!;
  if ("size" in change) field.size = change.size;
  else if ("type" in change) field.type = change.type;
  else if ("value" in change) {
    if (field.bytes.length < 2) return;
    const view = new DataView(field.bytes.buffer);
    view.setUint16(2 * (change.at % Math.floor(field.bytes.length / 2)), change.value, true);
  } else if (change.kind === "drop") fields.splice(at, 1);
  else {
    const other = change.other % fields.length;
    if (change.kind === "double") fields.splice(other, 0, { ...field, bytes: field.bytes.slice() });
    else [fields[at], fields[other]] = [fields[other]!, field];
  }
}

test(
  "a state that a device saves is taken, or refused with a reason, and the VF can be started again",
  async () => {
    const heads = fc.array(fc.record({ queue: u16, heads: fc.array(u16, { maxLength: 8 }) }), { maxLength: 4 });
    const property = fc.asyncProperty(
      fc.array(blobChange, { maxLength: 4 }),
      heads,
      heads,
      fc.constantFrom("drained", "listed"),
      async (changes, inFlight, completed, mode) => {
        try {
          const { mover, vf, rings, fn } = await running(QUEUES);
          vf.blob = changed({ ...vf.state!, inFlight, completed }, changes);
          await tried(mover.freeze(rings, mode as "drained" | "listed", soon(OPERATION)));
          vf.blob = undefined;
          await mover.reset(soon());
          await mover.configure(wantedState(QUEUES), soon());
          expect(fn.status).toBe(0x0f);
        } finally {
          await disposeAll();
        }
      },
    );
    await fuzz("saved states", property, { batch: 20 });
  },
  FUZZ_TIMEOUT,
);

const lie = fc.oneof(
  { weight: 4, arbitrary: fc.constant("honest" as const) },
  { weight: 2, arbitrary: fc.record({ status: fc.constantFrom(1, 4, 0x81, 0x84, 0x85, 0xff, 7) }) },
  { weight: 2, arbitrary: fc.record({ result: fc.uint8Array({ maxLength: 40 }) }) },
  { weight: 2, arbitrary: fc.record({ fill: fc.constantFrom(0, 1, 0x80, 0xff) }) },
  { weight: 1, arbitrary: fc.record({ late: fc.constantFrom(1, 2 * OPERATION) }) },
  { weight: 1, arbitrary: fc.constant("silence" as const) },
);

const PAGES = 100;
const step = fc.oneof(
  fc.constantFrom("track", "untrack", "freeze", "run", "reset", "other log", "prepare"),
  fc.record({ write: fc.nat(PAGES - 1) }),
);

test(
  "whatever a device answers about dirty pages, nothing hangs, and other memory than the log's is not marked",
  async () => {
    const property = fc.asyncProperty(
      fc.subarray([...TRACKING_MODES], { minLength: 1 }),
      fc.array(lie, { maxLength: 12 }),
      fc.array(step, { minLength: 2, maxLength: 8 }),
      async (modes, lies, steps) => {
        try {
          const { mover, pf, vf, rings } = await setUpTracking(modes);
          const logs = [new FrontEndLog(PAGES + 40, 4096), new FrontEndLog(PAGES + 40, 4096)];
          let log = logs[0]!;
          const left = [...lies];
          const under: Promise<void>[] = [];
          const strays: string[] = [];
          pf.answer = async (asked): Promise<FakeAnswer> => {
            const next = asked.class === 65 ? (left.shift() ?? "honest") : "honest";
            if (next === "honest") return pf.honest(asked);
            if (next === "silence") return next;
            if ("status" in next) return next;
            if ("result" in next) return { status: 0, result: next.result };
            if ("fill" in next) return { status: 0, result: new Uint8Array(asked.room).fill(next.fill) };
            const late = Bun.sleep(next.late);
            under.push(late);
            await late;
            try {
              return pf.honest(asked);
            } catch (error) {
              strays.push(`${asked.name}: ${error}`);
              return "silence";
            }
          };
          await mover.prove(soon(OPERATION));
          await tried(mover.configure(wantedState(1), soon(OPERATION)));
          for (const one of steps) {
            if (typeof one === "object") {
              if (vf.tracking !== undefined && one.write * 4096 < vf.tracking.range.length) {
                // One that said it had ended reaches nothing any more.
                try {
                  pf.write(1, one.write);
                } catch (error) {
                  expect(`${error}`).toContain("not mapped");
                }
              }
            } else if (one === "other log") log = logs.find((other) => other !== log)!;
            else if (one === "track") await tried(mover.track(log.tracking(PAGES), soon(OPERATION)));
            else if (one === "untrack") await tried(mover.track(undefined, soon(OPERATION)));
            else if (one === "freeze") await tried(mover.freeze(rings, "drained", soon(OPERATION)));
            else if (one === "run") await tried(mover.configure(wantedState(1), soon(OPERATION)));
            else if (one === "prepare") await tried(mover.prepare(wantedState(1), soon(OPERATION)));
            else await tried(mover.reset(soon(OPERATION)));
          }
          left.length = 0;
          await Promise.all(under);
          await Bun.sleep(2);
          await tried(mover.reset(soon()));
          await tried(mover.track(undefined, soon()));
          expect(strays).toEqual([]);
          for (const one of logs) expect(one.take().every((page) => page < PAGES)).toBe(true);
          // Memory stays mapped for a device only that did not do what it was told.
          if (lies.every((each) => each === "honest")) expect(pf.maps).toBe(0);
        } finally {
          await disposeAll();
        }
      },
    );
    await fuzz("answers about dirty pages", property, { batch: 5 });
  },
  FUZZ_TIMEOUT,
);
