import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { silentLogger } from "../../../src/base/log.ts";
import type { DeviceClass, Plugin } from "../../../src/plugin.ts";
import { BUILT_IN_PLUGINS, PluginRegistry } from "../../../src/plugin-host.ts";
import { rejection } from "../../kit/rejection.ts";

const rng: DeviceClass = {
  name: "rng",
  virtioId: 4,
  configSpace: {},
  features: { names: {} },
  queues: () => 1,
};

const plugin = (name: string, ...classes: unknown[]): Plugin => ({
  name,
  apiVersion: 1,
  setup(host) {
    for (const deviceClass of classes) host.deviceClass(deviceClass as DeviceClass);
  },
});

test("a class is found by its virtio id and by its name", () => {
  const registry = new PluginRegistry();
  registry.register(plugin("rng", rng), "here");
  expect(registry.deviceClassById(4)).toBe(rng);
  expect(registry.deviceClassByName("rng")).toBe(rng);
  expect(registry.deviceClassById(5)).toBeUndefined();
});

describe("refused, naming the plugin and the member", () => {
  const refused: [string, unknown, string][] = [
    ["no plugin at all", undefined, "plugin (here)"],
    ["another API version", { ...plugin("x"), apiVersion: 2 }, `plugin x (here): member "apiVersion" is 2, expected 1`],
    ["a bad name", plugin("X y"), `member "name" is "X y"`],
    ["an unknown member of the plugin", { ...plugin("x"), deviceclass: 1 }, `member "deviceclass" is not known`],
    ["setup is no function", { ...plugin("x"), setup: 1 }, `member "setup" is not a function`],
    [
      "setup fails",
      {
        ...plugin("x"),
        setup() {
          throw new Error("no hardware");
        },
      },
      "plugin x (here): its setup failed: no hardware",
    ],
    ["a missing member", plugin("x", { ...rng, virtioId: undefined }), `device class rng: member "virtioId"`],
    ["an unknown member", plugin("x", { ...rng, queue: 1 }), `device class rng: member "queue" is not known`],
    ["queues is no function", plugin("x", { ...rng, queues: 1 }), `member "queues" is not a function`],
    ["adminQueue is no function", plugin("x", { ...rng, adminQueue: 0 }), `member "adminQueue" is not a function`],
    ["a bit of the core is named", plugin("x", { ...rng, features: { names: { 32: "V" } } }), "names bit 32"],
    ["a bit of the core is added", plugin("x", { ...rng, features: { names: {}, add: [33] } }), "features.add[0]"],
    ["a bad config field", plugin("x", { ...rng, configSpace: { a: ["u8", 0] } }), `"configSpace.a" is ["u8",0]`],
    ["writable but not there", plugin("x", { ...rng, writableConfig: ["wce"] }), `"writableConfig" names wce`],
    [
      "a message without a handler",
      plugin("x", { ...rng, messages: { 40: { name: "M", size: 0, handle: 1 } } }),
      `"messages.40.handle" is not a function`,
    ],
    [
      "a request of the core",
      plugin("x", { ...rng, messages: { 5: { name: "M", size: 8, handle: async () => undefined } } }),
      `"messages.5" would replace SET_MEM_TABLE of the core`,
    ],
    ["two classes of one id", plugin("x", rng, { ...rng, name: "other" }), "meets rng with id 4"],
    ["no class but a text", plugin("x", "rng"), "device class 0"],
  ];
  for (const [what, candidate, message] of refused) {
    test(what, () => {
      const registry = new PluginRegistry();
      expect(() => registry.register(candidate, "here")).toThrow(message);
      expect(registry.deviceClasses).toEqual([]);
    });
  }

  test("a name and an id that are taken", () => {
    const registry = new PluginRegistry();
    registry.register(plugin("rng", rng), "first.ts");
    expect(() => registry.register(plugin("rng"), "second.ts")).toThrow("its name is taken by first.ts");
    expect(() => registry.register(plugin("mine", { ...rng, name: "mine" }), "second.ts")).toThrow("of plugin rng");
  });
});

describe("loading", () => {
  let directory: string;
  const source = (name: string, id: number) => `
    import { queues } from "./queues.ts";
    const deviceClass = { name: "${name}", virtioId: ${id}, configSpace: {}, features: { names: {} }, queues };
    export default { name: "${name}", apiVersion: 1, setup(host) { host.deviceClass(deviceClass); } };`;

  function write(folder: string, name: string, id: number): string {
    mkdirSync(folder, { recursive: true });
    writeFileSync(join(folder, "queues.ts"), "export const queues = (): number => 1;");
    writeFileSync(join(folder, "index.ts"), source(name, id));
    return join(folder, "index.ts");
  }

  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), "vhostd-plugins-"));
  });
  afterEach(() => rmSync(directory, { recursive: true }));

  test("folders that are built in, paths, and npm names from their directory", async () => {
    write(join(directory, "built-in", "one"), "one", 41);
    mkdirSync(join(directory, "built-in", "empty"));
    const path = write(join(directory, "two"), "two", 42);
    write(join(directory, "node_modules", "three"), "three", 43);
    writeFileSync(join(directory, "node_modules/three/package.json"), `{"name":"three","main":"index.ts"}`);
    const registry = await PluginRegistry.load(
      { builtIn: join(directory, "built-in"), plugins: [path, "three"], directory },
      silentLogger,
    );
    expect(registry.deviceClasses.map(({ name, virtioId }) => [name, virtioId])).toEqual([
      ["one", 41],
      ["two", 42],
      ["three", 43],
    ]);
  });

  test("a plugin that cannot be found or loaded is named", async () => {
    const load = (plugins: string[], more = {}) => PluginRegistry.load({ plugins, ...more }, silentLogger);
    expect((await rejection(load(["/nowhere/x.ts"]))).message).toContain("plugin /nowhere/x.ts cannot be loaded");
    expect((await rejection(load(["nobody"], { directory }))).message).toContain(
      `plugin nobody: not found from ${directory}`,
    );
    expect((await rejection(load(["nobody"]))).message).toContain(`"plugin-directory"`);
  });

  test("those of this project register", async () => {
    const registry = await PluginRegistry.load({ builtIn: BUILT_IN_PLUGINS, plugins: [] }, silentLogger);
    expect(registry.deviceClassById(2)?.name).toBe("blk");
  });
});
