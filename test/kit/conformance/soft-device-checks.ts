import fc from "fast-check";
import type { SoftChange, SoftDevice, SoftOptionValue, SoftRequest } from "../../../src/plugin.ts";
import { configSize } from "../../../src/virtio/config-space.ts";
import { describeFeatures } from "../../../src/virtio/features.ts";
import { checkStateFields } from "./class-checks.ts";
import { leftOpen, openDescriptors } from "./descriptors.ts";
import { CLASS_BITS } from "./feature-checks.ts";
import { calling, demand, holds, outcome, refusal } from "./holds.ts";
import { strictConfig } from "./inputs.ts";
import { candidates, type OptionTrial } from "./option-trials.ts";
import { type Check, type LoadedSubject, makeSoftDevice, PATIENCE, softClass, softOptions } from "./subject.ts";
import { writableBytes } from "./writable.ts";

/** Of a soft device: what its options may say. */
const QUEUES_MAX = 1024;
const WRITES_RUNS = 50;
const SERVE_RUNS = 30;
/** Bytes. */
const REQUEST_MAX = 4096;

/** What is demanded of a software device on its own. */
export const SOFT_DEVICE_CHECKS: readonly Check[] = [
  { name: "its features and queues are those of the class", of: "software device", run: fitsClass },
  { name: "its configuration keeps its length", of: "software device", run: keepsLength },
  { name: "writes reach writable fields only, and a reset undoes them", of: "software device", run: undoesWrites },
  { name: "set takes what check takes, and nothing else", of: "software device", run: setsWhatItChecks },
  { name: "create leaves nothing open", of: "software device", run: closesEverything },
  { name: "requests are served, whatever is in them", of: "software device", run: servesRequests },
  { name: "its state goes to another device", of: "software device", run: movesState },
];

async function fitsClass(subject: LoadedSubject): Promise<void> {
  const { deviceClass } = subject;
  using device = makeSoftDevice(subject);
  const foreign = describeFeatures(device.features & ~CLASS_BITS).join(", ");
  demand(foreign === "", `the device offers ${foreign}; a class has bits 0 to 23 and 50 to 63`);
  const { names } = deviceClass.features;
  const nameless = Array.from({ length: 64 }, (_, bit) => bit).filter(
    (bit) => ((device.features >> BigInt(bit)) & 1n) === 1n && !Object.hasOwn(names, bit),
  );
  demand(nameless.length === 0, `the device offers bit ${nameless[0]}, for which features.names has no name`);
  demand(
    Number.isInteger(device.queues) && device.queues >= 1 && device.queues <= QUEUES_MAX,
    `the device has ${device.queues} queues, must be from 1 to ${QUEUES_MAX}`,
  );
  const config = strictConfig(deviceClass.configSpace, device.config());
  const queues = calling("queues()", () => deviceClass.queues(config, device.features));
  demand(queues <= device.queues, `queues() is ${queues}, the device has ${device.queues}`);
  const control = deviceClass.control?.queue(config, device.features) ?? 0;
  demand(control < device.queues, `control.queue() is ${control}, the device has ${device.queues} queues`);
  const forwards = device.worker.name === "forward";
  demand(!forwards || device.serve !== undefined, `the worker "forward" hands requests over, and there is no serve()`);
  demand(forwards || device.serve === undefined, `serve() is never called with the worker "${device.worker.name}"`);
}

async function keepsLength(subject: LoadedSubject): Promise<void> {
  const { configSpace } = subject.deviceClass;
  using device = makeSoftDevice(subject);
  const first = device.config();
  const limit = configSize(configSpace);
  demand(first.length <= limit, `config() has ${first.length} bytes, configSpace ${limit}: nobody reads the rest`);
  const ends = Object.entries(configSpace).map(([name, [offset]]) => [name, offset] as const);
  const cut = ends.find(([name, offset]) => offset < first.length && offset + sizeOf(subject, name) > first.length);
  demand(cut === undefined, `config() has ${first.length} bytes and ends within the field ${cut?.[0]}`);
  first.fill(0xa5);
  const second = device.config();
  demand(
    first.length === 0 || !Bun.deepEquals(first, second),
    "config() gives the device's own bytes away: give a copy (slice)",
  );
  for (const trial of candidates(softClass(subject).options, { live: true })) {
    attempt(() => device.set(trial.option, trial.value));
    const { length } = device.config();
    demand(length === second.length, `config() has ${length} bytes after ${trial.text}, ${second.length} before`);
  }
}

function sizeOf({ deviceClass: { configSpace } }: LoadedSubject, field: string): number {
  return configSize({ it: [0, configSpace[field]![1]] });
}

async function undoesWrites(subject: LoadedSubject): Promise<void> {
  const { deviceClass } = subject;
  using device = makeSoftDevice(subject);
  const initial = device.config();
  const writable = writableBytes(deviceClass);
  const limit = Math.max(initial.length, configSize(deviceClass.configSpace)) + 8;
  const write = fc.record({ offset: fc.nat(limit), bytes: fc.uint8Array({ minLength: 1, maxLength: 8 }) });
  await holds(
    fc.array(write, { minLength: 1, maxLength: 4 }),
    (writes) => {
      for (const { offset, bytes } of writes) {
        checkChange(
          "writeConfig()",
          calling("writeConfig()", () => device.writeConfig(offset, bytes)),
        );
      }
      const after = device.config();
      demand(
        after.length === initial.length,
        `config() has ${after.length} bytes after a write, ${initial.length} before`,
      );
      const wrong = after.findIndex((byte, at) => byte !== initial[at] && !writable.has(at));
      demand(wrong < 0, `a write changes byte ${wrong} of the configuration, which is in no field of writableConfig`);
      const change = calling("reset()", () => device.reset?.());
      if (change !== undefined) checkChange("reset()", change);
      const left = device.config().findIndex((byte, at) => byte !== initial[at]);
      demand(left < 0, `byte ${left} of the configuration is still as the driver wrote it after reset()`);
    },
    { runs: WRITES_RUNS },
  );
}

async function setsWhatItChecks(subject: LoadedSubject): Promise<void> {
  using device = makeSoftDevice(subject);
  for (const trial of candidates(softClass(subject).options, { live: true })) {
    const refused = device.check === undefined ? undefined : attempt(() => device.check?.(trial.option, trial.value));
    if (refused !== undefined) refusal(`check() of ${trial.text}`, refused.thrown);
    const before = device.config();
    let change: SoftChange | undefined;
    const failed = attempt(() => {
      change = device.set(trial.option, trial.value);
    });
    const same = Bun.deepEquals(before, device.config());
    if (failed !== undefined) {
      const { message } = refusal(`set() of ${trial.text}`, failed.thrown);
      const agreed = device.check === undefined || refused !== undefined;
      demand(agreed, `set() refuses ${trial.text}, which check() takes: ${message}`);
      demand(same, `set() refuses ${trial.text}, and the configuration has changed`);
      continue;
    }
    demand(refused === undefined, `set() takes ${trial.text}, which check() refuses`);
    checkChange(`set() of ${trial.text}`, change);
    demand(
      same || change?.configChanged === true,
      `set() of ${trial.text} changes the configuration and does not say so (configChanged)`,
    );
  }
}

async function closesEverything(subject: LoadedSubject): Promise<void> {
  const { create, options } = softClass(subject);
  const given = softOptions(subject);
  const tries: readonly (OptionTrial | undefined)[] = [undefined, ...candidates({ ...options, ...COMMON }, {})];
  for (const trial of tries) {
    const text = trial === undefined ? "its options" : trial.text;
    const wanted = trial === undefined ? given : { ...given, [trial.option]: trial.value };
    const make = () => {
      const failed = attempt(() => create(wanted)[Symbol.dispose]());
      if (failed !== undefined) refusal(`create() with ${text}`, failed.thrown);
      demand(trial !== undefined || failed === undefined, `create() refuses ${text}: ${failed?.thrown}`);
    };
    make();
    const before = openDescriptors();
    make();
    const left = await leftOpen(before);
    demand(left.length === 0, `create() with ${text}, and dispose where it succeeds, leave open: ${left.join(", ")}`);
  }
}

/** Those of every soft device, which a class may refuse, too. */
const COMMON = {
  queues: { type: "number", description: "virtqueues" },
  ringSize: { type: "number", description: "entries" },
} as const;

async function servesRequests(subject: LoadedSubject): Promise<void> {
  using device = makeSoftDevice(subject);
  if (device.serve === undefined) return;
  const request = fc.record({
    queue: fc.nat(device.queues - 1),
    readable: fc.oneof(fc.constant(new Uint8Array(0)), fc.uint8Array({ maxLength: REQUEST_MAX })),
    writable: fc.nat(REQUEST_MAX),
  });
  const served: SoftRequest[] = [];
  const serveOne = async (given: SoftRequest) => {
    const result = await outcome("serve()", subject.patience ?? PATIENCE, () => device.serve!(given));
    // A request may be refused: it fails the device, which is its driver's fault.
    if ("thrown" in result) refusal("serve()", result.thrown);
    else demand(result.value instanceof Uint8Array, `serve() answers ${Bun.inspect(result.value)}, must be bytes`);
  };
  const noteAndServe = (given: SoftRequest) => {
    served.push(given);
    return serveOne(given);
  };
  await holds(request, noteAndServe, { runs: SERVE_RUNS, shrink: false });
  // What is opened once and kept belongs to the device: the same requests again need nothing more.
  const before = openDescriptors();
  for (const given of served) await serveOne(given);
  const left = await leftOpen(before);
  demand(left.length === 0, `serve() leaves open after ${served.length} requests: ${[...new Set(left)].join(", ")}`);
}

async function movesState(subject: LoadedSubject): Promise<void> {
  const { deviceClass } = subject;
  using source = makeSoftDevice(subject);
  const saved = (facts: Readonly<Record<string, number>>) => {
    const fields = calling("stateFields()", () => source.stateFields?.(facts)) ?? [];
    checkStateFields("stateFields() of the device", fields);
    return fields;
  };
  const fields = saved({});
  const config = strictConfig(deviceClass.configSpace, source.config());
  const types = deviceClass.stateFields?.(config, source.features).map(({ type }) => type) ?? [];
  const own = fields.map(({ type }) => type);
  demand(Bun.deepEquals(types, own), `stateFields(): the class has types ${list(types)}, the device ${list(own)}`);

  for (const value of [0, 1, 2]) checkRestore(source, saved(allFacts(value)), "its own fields");
  checkRestore(source, [], "no field");
  for (const type of [4, 5, 6, 7].filter((type) => !own.includes(type))) {
    checkRestore(source, [{ type, bytes: new Uint8Array(4) }], `the unknown type ${type}`);
  }
  const field = fc.record({ type: fc.constantFrom(4, 5, 6, 7), bytes: fc.uint8Array({ maxLength: 64 }) });
  await holds(
    fc.array(field, { maxLength: 4 }),
    (random) => {
      const failed = attempt(() => source.restoreFields?.(random));
      if (failed !== undefined) refusal("restoreFields()", failed.thrown);
    },
    { runs: WRITES_RUNS },
  );
  for (const up of [false, true]) {
    const change = calling("carrierChanged()", () => source.carrierChanged?.(up));
    if (change !== undefined) checkChange("carrierChanged()", change);
  }
}

function checkRestore(
  device: SoftDevice,
  fields: Parameters<NonNullable<SoftDevice["restoreFields"]>>[0],
  what: string,
) {
  const failed = attempt(() => device.restoreFields?.(fields));
  demand(failed === undefined, `restoreFields() refuses ${what}: ${failed?.thrown}`);
}

/** Of a worker of any kind: this is what it answers, whatever it is asked. */
function allFacts(value: number): Readonly<Record<string, number>> {
  return new Proxy({}, { get: () => value });
}

function list(types: readonly number[]): string {
  return types.length === 0 ? "none" : types.join(", ");
}

/** @throws Error where it is nothing that a worker understands */
function checkChange(member: string, change: SoftChange | undefined): void {
  demand(
    typeof change === "object" && change !== null,
    `${member} returns ${Bun.inspect(change)}, must be a SoftChange`,
  );
  const { configChanged = false, parameters = {}, ...others } = change;
  demand(typeof configChanged === "boolean", `${member}: configChanged is ${Bun.inspect(configChanged)}`);
  const unknown = Object.keys(others)[0];
  demand(unknown === undefined, `${member} returns ${unknown}, which is not part of a SoftChange`);
  for (const [name, value] of Object.entries<SoftOptionValue | bigint>(parameters)) {
    const known = ["string", "number", "bigint", "boolean"].includes(typeof value);
    demand(known, `${member}: parameter ${name} of the worker is ${Bun.inspect(value)}`);
  }
}

/** What `work` throws, wrapped: it may be anything. */
function attempt(work: () => void): { readonly thrown: unknown } | undefined {
  try {
    work();
    return undefined;
  } catch (thrown) {
    return { thrown };
  }
}
