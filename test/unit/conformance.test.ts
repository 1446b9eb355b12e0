import { describe, expect, test } from "bun:test";
import { mkdtempSync, openSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { DeviceClass } from "../../src/plugin.ts";
import { CHECKS, type ConformanceSubject } from "../kit/conformance/index.ts";
import { rejection } from "../kit/rejection.ts";
import { ADDED, goodClass, HIDDEN, handling, soft, softDevice, softPart } from "./conformance-classes.ts";

/** The suite on trial: it finds nothing wrong with a good class, and each way to break it where it is to be found. */

const PLUGIN = join(import.meta.dir, "../../examples/plugin-rng/index.ts");
/** As the author of the good class says. Its control queue is behind the one queue for the guest. */
const SAID: ConformanceSubject = {
  plugin: PLUGIN,
  softvf: ["--queues", "3"],
  added: [ADDED],
  hidden: [HIDDEN],
  patience: 500,
};

const alone = CHECKS.filter(({ name }) => !name.includes("moved by"));

function check(name: string) {
  const found = CHECKS.find((each) => each.name === name);
  if (found === undefined) throw new Error(`no check has the name "${name}"`);
  return found;
}

/** The device shows one queue fewer than it has: the last is its control queue. */
const withControl = softDevice((device, bytes) => {
  bytes[0] = device.queues - 1;
  return {};
});
const good: DeviceClass = { ...goodClass, softDevice: withControl };

describe("a good class", () => {
  test.each(alone.map(({ name }) => name))("%s", async (name) => {
    await check(name).run({ ...SAID, deviceClass: good });
  });
});

const never = new Promise<never>(() => {});
const opened = () => openSync("/dev/zero", "r");

/** What is broken, in which check it is found, and what is said of it. */
const BROKEN: readonly [what: string, check: string, broken: Partial<DeviceClass>, says: RegExp][] = [
  [
    "two fields overlap",
    "its configuration space is a structure",
    { configSpace: { count: [0, "u16"], mode: [1, "u8"] } },
    /mode and count overlap at byte 1/,
  ],
  [
    "a field lies beyond what a message carries",
    "its configuration space is a structure",
    { configSpace: { count: [255, "u16"] } },
    /257 bytes, a message carries 256/,
  ],
  ["queues() throws", "queues() answers for any device", { queues: () => BigInt(0.5) as never }, /queues\(\) throws/],
  ["no queues", "queues() answers for any device", { queues: (config) => Number(config["count"]) }, /is 0, must be/],
  [
    "half a queue",
    "queues() answers for any device",
    { queues: (config) => Number(config["count"]) / 2 + 1 },
    /\.5, must/,
  ],
  [
    "queues() is random",
    "queues() answers for any device",
    { queues: () => 1 + Math.floor(Math.random() * 99) },
    /once more/,
  ],
  [
    "queues() reads beyond the structure",
    "queues() answers for any device",
    { queues: (config) => Number(config["pairs"] ?? 1) },
    /pairs is read from the configuration space, which has no such field \(with/,
  ],
  [
    "describe() throws",
    "describe() and the other members answer for any device",
    {
      describe(config) {
        if (Number(config["count"]) > 1000) throw new Error("too many");
        return {};
      },
    },
    /describe\(\) throws: too many/,
  ],
  [
    "describe() shows what is not there",
    "describe() and the other members answer for any device",
    { describe: (config) => ({ count: `${Number(config["count"]) / 0 - Infinity}` }) },
    /count is "NaN"/,
  ],
  [
    "another field is compared",
    "describe() and the other members answer for any device",
    { comparedConfig: () => ["speed"] },
    /names speed, which is not in configSpace/,
  ],
  [
    "state fields of the core",
    "describe() and the other members answer for any device",
    { stateFields: () => [{ type: 2, bytes: new Uint8Array(1) }] },
    /type 2 after 3, must be 4 to 7/,
  ],
  [
    "the control queue is the guest's",
    "its control queue is driven for any device",
    { control: { ...goodClass.control!, queue: () => 0 } },
    /control.queue\(\) is 0: the guest has the queues 0 to/,
  ],
  [
    "an answer that is not expected throws",
    "its control queue is driven for any device",
    {
      control: {
        ...goodClass.control!,
        commands: () => [
          {
            name: "USE",
            request: Uint8Array.of(1),
            answerSize: 1,
            accepted([answer]) {
              if (answer === 0xff) throw new Error("what is 255");
              return true;
            },
          },
        ],
      },
    },
    /USE: accepted\(\) throws: what is 255/,
  ],
  [
    "a feature is added that nobody meant",
    "a guest is offered what the device offers, and no more",
    { features: { ...goodClass.features, add: [ADDED, 1] } },
    /the guest is offered ONE, which the device does not offer/,
  ],
  [
    "a feature that was to be hidden",
    "a guest is offered what the device offers, and no more",
    { features: { ...goodClass.features, hide: [] } },
    /the guest is offered CONTROL/,
  ],
  [
    "a feature is hidden that nobody meant",
    "a guest is offered what the device offers, and no more",
    { features: { ...goodClass.features, hide: [HIDDEN, 0] } },
    /the guest is not offered ZERO/,
  ],
  [
    "what was to be added is the device's",
    "the device is not told of what was added",
    { features: { ...goodClass.features, add: [] } },
    /ANNOUNCE would be acknowledged to the device/,
  ],
  [
    "a feature without a name",
    "features that are added and hidden have names",
    { features: { ...goodClass.features, hide: [HIDDEN, 9] } },
    /no name for bit 9/,
  ],
  [
    "a feature that is added and hidden",
    "features that are added and hidden have names",
    { features: { ...goodClass.features, hide: [HIDDEN, ADDED] } },
    /bit 21 is added and hidden/,
  ],
  [
    "a message that nobody may send",
    "its messages can be sent",
    { protocolFeatures: [] },
    /SET_THING needs protocol feature MTU/,
  ],
  [
    "a message that is never answered",
    "its messages answer or refuse, whatever is in them",
    handling(([first]) => (first === 0 ? never : Promise.resolve(undefined))),
    /SET_THING did not end within/,
  ],
  [
    "a handler that throws a text",
    "its messages answer or refuse, whatever is in them",
    handling(() => Promise.reject("bad")),
    /throws "bad", which is no Error/,
  ],
  [
    "a handler that answers with a number",
    "its messages answer or refuse, whatever is in them",
    handling(async () => 0 as never),
    /SET_THING answers 0/,
  ],
  [
    "a handler that reads beyond the structure",
    "its messages answer or refuse, whatever is in them",
    handling(async (_payload, { config }) => void config["mtu"]),
    /SET_THING: mtu is read/,
  ],
  [
    "an answer of absurd size",
    "its messages answer or refuse, whatever is in them",
    handling(async () => new Uint8Array(100_000)),
    /SET_THING answers 100000 bytes, limit 4096/,
  ],
  [
    "a handler that blocks",
    "its messages answer or refuse, whatever is in them",
    handling(async () => void Bun.sleepSync(600)),
    /SET_THING blocks for \d+ ms the one thread that serves all functions, limit 500 ms/,
  ],
  [
    "a handler that forgets a file descriptor",
    "its messages leave file descriptors alone",
    handling(async () => void opened()),
    /leaves 1 file descriptors open: \/dev\/zero/,
  ],
  [
    "a handler that keeps a file descriptor of the message",
    "its messages leave file descriptors alone",
    handling(async (_payload, _device, fds) => void openSync(`/proc/self/fd/${fds[1]}`, "r")),
    /keeps a file descriptor of the message open \(\/memfd/,
  ],
  [
    "a handler that closes what it was lent",
    "its messages leave file descriptors alone",
    handling(async (_payload, _device, [fd]) => void (await import("node:fs")).closeSync(fd!)),
    /closes file descriptor 0 of the message/,
  ],
  [
    "a device with bits of the core",
    "its features and queues are those of the class",
    softPart({ features: 1n << 32n }),
    /offers VERSION_1/,
  ],
  [
    "a device without queues",
    "its features and queues are those of the class",
    softPart({ queues: 0 }),
    /has 0 queues/,
  ],
  [
    "fewer queues than it says",
    "its features and queues are those of the class",
    softPart({ queues: 1 }),
    /queues\(\) is 2, the device has 1/,
  ],
  [
    "nobody serves",
    "its features and queues are those of the class",
    soft((device) => {
      delete device.serve;
      return {};
    }),
    /there is no serve\(\)/,
  ],
  [
    "configuration longer than the table",
    "its configuration keeps its length",
    softPart({ config: () => new Uint8Array(9) }),
    /config\(\) has 9 bytes, configSpace 8/,
  ],
  [
    "configuration that ends within a field",
    "its configuration keeps its length",
    softPart({ config: () => new Uint8Array(7) }),
    /ends within the field rest/,
  ],
  [
    "configuration that changes its length",
    "its configuration keeps its length",
    soft((_device, bytes) => ({ config: () => bytes.slice(0, bytes[5] === 100 ? 4 : 8) })),
    /config\(\) has 4 bytes after steps=100, 8 before/,
  ],
  [
    "the device's own bytes",
    "its configuration keeps its length",
    soft((_device, bytes) => ({ config: () => bytes })),
    /give a copy/,
  ],
  [
    "a reset that undoes nothing",
    "writes reach writable fields only, and a reset undoes them",
    softPart({ reset: () => ({}) }),
    /byte 4 of the configuration is still as the driver wrote it/,
  ],
  [
    "a write to what cannot be written",
    "writes reach writable fields only, and a reset undoes them",
    soft((_device, bytes) => ({
      writeConfig(offset, [value = 0]) {
        if (offset < bytes.length) bytes[offset] = value;
        return {};
      },
    })),
    /changes byte \d of the configuration, which is in no field of writableConfig/,
  ],
  [
    "a write beyond the end throws",
    "writes reach writable fields only, and a reset undoes them",
    soft((_device, bytes) => ({
      writeConfig(offset, written) {
        if (offset > bytes.length) throw new RangeError(`offset ${offset}`);
        return offset < 0 ? { configChanged: written.length > 0 } : {};
      },
    })),
    /writeConfig\(\) throws: offset/,
  ],
  [
    "set takes what check refuses",
    "set takes what check takes, and nothing else",
    softPart({ set: () => ({}) }),
    /set\(\) takes steps=0, which check\(\) refuses/,
  ],
  [
    "check takes what set refuses",
    "set takes what check takes, and nothing else",
    softPart({ check: () => {} }),
    /set\(\) refuses steps=0, which check\(\) takes/,
  ],
  [
    "a change that is not announced",
    "set takes what check takes, and nothing else",
    soft((_device, bytes) => ({
      check: () => {},
      set(_option, value) {
        bytes[5] = Number(value) & 0xff;
        return {};
      },
    })),
    /changes the configuration and does not say so/,
  ],
  [
    "a device that is not closed",
    "create leaves nothing open",
    softPart({ dispose: () => {} }),
    /leave open: \/dev\/null/,
  ],
  [
    "a device that fails half made",
    "create leaves nothing open",
    {
      softDevice: {
        ...withControl,
        create(options) {
          if (options["steps"] === 0) opened();
          return withControl.create(options);
        },
      },
    },
    /create\(\) with steps=0.*leave open: \/dev\/zero/,
  ],
  [
    "a request that is never served",
    "requests are served, whatever is in them",
    softPart({ serve: ({ readable }) => (readable.length === 0 ? never : Promise.resolve(readable)) }),
    /serve\(\) did not end within/,
  ],
  [
    "a request that blocks",
    "requests are served, whatever is in them",
    softPart({
      async serve({ writable }) {
        Bun.sleepSync(600);
        return new Uint8Array(writable);
      },
    }),
    /serve\(\) blocks for \d+ ms/,
  ],
  [
    "a file that is opened for each request",
    "requests are served, whatever is in them",
    softPart({
      async serve({ writable }) {
        opened();
        return new Uint8Array(writable);
      },
    }),
    /serve\(\) leaves open after 30 requests: \/dev\/zero/,
  ],
  [
    "a request that is served with a text",
    "requests are served, whatever is in them",
    softPart({ serve: async () => "random" as never }),
    /serve\(\) answers "random"/,
  ],
  [
    "state that the class knows nothing of",
    "its state goes to another device",
    softPart({ stateFields: () => [{ type: 5, bytes: new Uint8Array(4) }] }),
    /the class has types 4, the device 5/,
  ],
  [
    "state that a device does not take back",
    "its state goes to another device",
    softPart({
      restoreFields() {
        throw new Error("not mine");
      },
    }),
    /restoreFields\(\) refuses its own fields: Error: not mine/,
  ],
  [
    "state of a later version",
    "its state goes to another device",
    softPart({
      restoreFields(fields) {
        if (fields.some(({ type }) => type > 4)) throw new Error("unknown");
        return {};
      },
    }),
    /restoreFields\(\) refuses the unknown type 5/,
  ],
];

describe("a class that is broken", () => {
  test.each(BROKEN)("%s", async (_what, name, broken, says) => {
    const error = await rejection(check(name).run({ ...SAID, deviceClass: { ...good, ...broken } }));
    expect(error.message).toMatch(says);
  });
});

describe("a plugin that is broken", () => {
  /** A plugin in a file. */
  function plugin(source: string) {
    const directory = mkdtempSync(join(tmpdir(), "conformance-"));
    const path = join(directory, "index.ts");
    writeFileSync(path, source);
    return { path, [Symbol.dispose]: () => rmSync(directory, { recursive: true }) };
  }

  test("its setup throws", async () => {
    using bad = plugin(`export default { name: "bad", apiVersion: 1, setup() { throw new Error("no license"); } };`);
    const subject = { ...SAID, plugin: bad.path, deviceClass: good };
    const error = await rejection(check("the plugin is registered").run(subject));
    expect(error.message).toContain(`plugin bad (${bad.path}): its setup failed: no license`);
  });

  test("its path is relative", async () => {
    const error = await rejection(
      check("the plugin is registered").run({ ...SAID, plugin: "index.ts", deviceClass: good }),
    );
    expect(error.message).toContain(`plugin is "index.ts", must be an absolute path`);
  });

  test("it replaces a request of the core", async () => {
    using bad = plugin(`export default { name: "bad", apiVersion: 1, setup: (host) => host.deviceClass({
      name: "bad", virtioId: 60, configSpace: {}, features: { names: {} }, queues: () => 1,
      messages: { 5: { name: "MINE", size: 8, handle: async () => undefined } },
    }) };`);
    const subject = { ...SAID, plugin: bad.path, deviceClass: good };
    const error = await rejection(check("the plugin is registered").run(subject));
    expect(error.message).toContain(`"messages.5" would replace SET_MEM_TABLE of the core`);
  });

  test("it brings no class, or several", async () => {
    using bad = plugin(`export default { name: "bad", apiVersion: 1, setup() {} };`);
    const error = await rejection(
      check("the plugin is registered").run({ ...SAID, plugin: bad.path, deviceClass: good }),
    );
    expect(error.message).toContain("brings the classes none");
  });

  test("it imports the host", async () => {
    const imports = check("it imports nothing of the host at run time");
    const host = join(import.meta.dir, "../../src/base/errors.ts");
    for (const [source, says] of [
      [`import { VhostdError } from "${host}"; throw new VhostdError("io", "x");`, "errors.ts of the host at run time"],
      [`import { plugin } from "vfe-vhostd/plugin"; plugin();`, "imports vfe-vhostd/plugin at run time"],
    ] as const) {
      using bad = plugin(source);
      expect((await rejection(imports.run({ ...SAID, plugin: bad.path, deviceClass: good }))).message).toContain(says);
    }
    using typesOnly = plugin(`import type { Plugin } from "vfe-vhostd/plugin"; export default {} as Plugin;`);
    await imports.run({ ...SAID, plugin: typesOnly.path, deviceClass: good });
  });
});

test("each check has been seen to fail", () => {
  const seen = new Set(BROKEN.map(([, name]) => name));
  const unseen = alone.map(({ name }) => name).filter((name) => !seen.has(name));
  expect(unseen).toEqual(["the plugin is registered", "it imports nothing of the host at run time"]);
});
