import { closeSync, openSync } from "node:fs";
import type { ClassMessage, DeviceClass, SoftDevice, SoftDeviceClass, SoftOptionValues } from "../../src/plugin.ts";

/** A class that has a bit of everything and nothing wrong with it, to be broken in one place at a time. */

export const ADDED = 21;
export const HIDDEN = 17;
/** A message of the class, which has an fd. */
const MESSAGE = 99;

const SIZE = 8;
const MODE = 4;
const STEPS_MAX = 100;

function checkSteps(value: unknown): number {
  if (typeof value === "number" && value >= 1 && value <= STEPS_MAX) return value;
  throw new Error(`option steps is ${value}, must be from 1 to ${STEPS_MAX}`);
}

/** Members that a test replaces; what they need of the device is passed to them. */
export type SoftParts = Partial<Omit<SoftDevice, typeof Symbol.dispose>> & { dispose?(fd: number): void };

/** @param broken takes the place of what the device has */
export function softDevice(broken: (device: SoftDevice, bytes: Uint8Array) => SoftParts = () => ({})): SoftDeviceClass {
  return {
    pciClass: 0,
    options: { steps: { type: "number", description: "steps", default: 1, live: true } },
    create: (options) => create(options, broken),
  };
}

function create(options: SoftOptionValues, broken: (device: SoftDevice, bytes: Uint8Array) => SoftParts): SoftDevice {
  let steps = checkSteps(options["steps"]);
  const fd = openSync("/dev/null", "r");
  const bytes = new Uint8Array(SIZE);
  bytes[0] = Number(options["queues"]);
  bytes[5] = steps;
  const device: SoftDevice = {
    features: 1n,
    queues: Number(options["queues"]),
    worker: { name: "forward", parameters: { steps } },
    config: () => bytes.slice(),
    writeConfig(offset, written) {
      const value = written[MODE - offset];
      if (value !== undefined) bytes[MODE] = value;
      return {};
    },
    reset() {
      bytes[MODE] = 0;
      return {};
    },
    check: (_option, value) => void checkSteps(value),
    set(_option, value) {
      steps = checkSteps(value);
      bytes[5] = steps;
      return { configChanged: true, parameters: { steps } };
    },
    serve: async ({ writable }) => new Uint8Array(writable),
    stateFields: () => [{ type: 4, bytes: Uint8Array.of(steps) }],
    restoreFields(fields) {
      for (const { type, bytes: value } of fields) if (type === 4 && value[0] !== undefined) steps = value[0];
      return {};
    },
    [Symbol.dispose]: () => closeSync(fd),
  };
  const { dispose, ...parts } = broken(device, bytes);
  if (dispose !== undefined) device[Symbol.dispose] = () => dispose(fd);
  return Object.assign(device, parts);
}

export const goodClass: DeviceClass = {
  name: "good",
  virtioId: 60,
  configSpace: { count: [0, "u16"], mac: [2, "u16"], mode: [MODE, "u8"], steps: [5, "u8"], rest: [6, "u16"] },
  writableConfig: ["mode"],
  features: { names: { 0: "ZERO", 1: "ONE", [ADDED]: "ANNOUNCE", [HIDDEN]: "CONTROL" }, add: [ADDED], hide: [HIDDEN] },
  queues: (config) => Math.max(1, Number(config["count"])),
  describe: (config) => ({ count: `${config["count"]}` }),
  adminQueue: () => 1,
  protocolFeatures: [4],
  messages: {
    [MESSAGE]: {
      name: "SET_THING",
      size: 8,
      needs: 4,
      fds: 2,
      async handle(payload) {
        if (payload[0] !== 0) throw new Error(`the thing is ${payload[0]}, must be 0`);
        return payload;
      },
    },
  },
  control: {
    queue: (config) => Math.max(1, Number(config["count"])),
    features: [HIDDEN],
    commands: ({ queues }) => [
      {
        name: "USE",
        request: Uint8Array.of(queues.length),
        answerSize: 1,
        accepted: ([answer]) => answer === 0,
      },
    ],
  },
  receives: (queue) => queue % 2 === 0,
  linkUp: () => true,
  comparedConfig: () => ["mac"],
  stateFields: () => [{ type: 4, bytes: Uint8Array.of(1) }],
  softDevice: softDevice(),
};

/** The good class with another message handler. */
export function handling(handle: ClassMessage["handle"]): Partial<DeviceClass> {
  const message = goodClass.messages![MESSAGE]!;
  return { messages: { [MESSAGE]: { ...message, handle } } };
}

/** The good class with another software device. */
export function soft(broken: Parameters<typeof softDevice>[0]): Partial<DeviceClass> {
  return {
    softDevice: softDevice((device, bytes) => {
      bytes[0] = device.queues - 1;
      return broken?.(device, bytes) ?? {};
    }),
  };
}

export function softPart(parts: SoftParts): Partial<DeviceClass> {
  return soft(() => parts);
}
