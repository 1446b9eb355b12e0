import { readdir } from "node:fs/promises";
import { dirname, isAbsolute, join } from "node:path";
import Type, { type TSchema } from "typebox";
import { asError, VhostdError } from "./base/errors.ts";
import type { Logger } from "./base/log.ts";
import type { AdoptionPolicy, DeviceClass, Plugin, PluginApiVersion } from "./plugin.ts";
import { findMismatch } from "./rpc/mismatch.ts";
import { Request } from "./vhost-user/messages.ts";

const API_VERSION: PluginApiVersion = 1;

/** Where plugins come from. */
export interface PluginSources {
  /** A directory whose folders are plugins, each with an `index.ts`. */
  readonly builtIn?: string;
  /** Absolute paths and npm names, in the order of the configuration. */
  readonly plugins: readonly string[];
  /** Where npm names are resolved from. */
  readonly directory?: string;
}

/** The plugins of the checkout or package that this program belongs to; a compiled program has them beside it. */
export const BUILT_IN_PLUGINS = join(
  import.meta.dir.startsWith("/$bunfs") ? dirname(process.execPath) : join(import.meta.dir, ".."),
  "plugins",
);

/** The device classes that this process knows, by who brought them, and its policy of adoption. */
export class PluginRegistry {
  private readonly names = new Map<string, string>();
  private readonly classes = new Map<number, { readonly deviceClass: DeviceClass; readonly plugin: string }>();
  private policy: { readonly adoption: AdoptionPolicy; readonly plugin: string } | undefined;

  /**
   * Imports and registers plugins: those built in, then the configured ones.
   * @throws VhostdError invalid, naming the plugin and what is wrong with it
   */
  static async load(sources: PluginSources, log: Logger): Promise<PluginRegistry> {
    const registry = new PluginRegistry();
    const builtIn = sources.builtIn === undefined ? [] : await pluginFolders(sources.builtIn);
    const configured = sources.plugins.map((plugin) => locate(plugin, sources.directory));
    for (const path of [...builtIn, ...configured]) registry.register(await importPlugin(path), path);
    log.debug(`plugins: ${[...registry.names.keys()].join(", ")}`);
    return registry;
  }

  /**
   * @param origin where the plugin was found, for errors
   * @throws VhostdError invalid; nothing of the plugin is registered then
   */
  register(candidate: unknown, origin: string): void {
    const plugin = checkPlugin(candidate, origin);
    const refused = (what: string, cause?: unknown) => refusal(`plugin ${plugin.name} (${origin}): ${what}`, cause);
    const earlier = this.names.get(plugin.name);
    if (earlier !== undefined) throw refused(`its name is taken by ${earlier}`);

    const added: DeviceClass[] = [];
    const policies: AdoptionPolicy[] = [];
    try {
      plugin.setup({
        deviceClass: (deviceClass) => void added.push(deviceClass),
        adoption: (policy) => void policies.push(policy),
      });
    } catch (error) {
      throw refused(`its setup failed: ${asError(error).message}`, error);
    }
    for (const [index, deviceClass] of added.entries()) {
      const problem = findProblem(deviceClass);
      if (problem !== undefined) throw refused(`device class ${deviceClass?.name ?? index}: ${problem}`);
      const { name, virtioId } = deviceClass;
      const others = [...this.classes.values()].concat(
        added.slice(0, index).map((other) => ({ deviceClass: other, plugin: plugin.name })),
      );
      const same = others.find((other) => other.deviceClass.virtioId === virtioId || other.deviceClass.name === name);
      if (same !== undefined) {
        const { deviceClass: other, plugin: owner } = same;
        throw refused(
          `device class ${name} with virtio id ${virtioId} meets ${other.name} with id ${other.virtioId} of plugin ${owner}`,
        );
      }
    }
    const [adoption, second] = policies;
    if (adoption !== undefined) {
      const problem = findPolicyProblem(adoption);
      if (problem !== undefined) throw refused(`policy of adoption: ${problem}`);
      if (second !== undefined) throw refused("it has more than one policy of adoption");
      if (this.policy !== undefined) throw refused(`plugin ${this.policy.plugin} has a policy of adoption already`);
      this.policy = { adoption, plugin: plugin.name };
    }
    this.names.set(plugin.name, origin);
    for (const deviceClass of added) this.classes.set(deviceClass.virtioId, { deviceClass, plugin: plugin.name });
  }

  /** How VFs of an earlier process are taken up; undefined where nothing is to be kept. */
  get adoption(): AdoptionPolicy | undefined {
    return this.policy?.adoption;
  }

  /** The class of a virtio device id (VIRTIO 1.2, 5). */
  deviceClassById(virtioId: number): DeviceClass | undefined {
    return this.classes.get(virtioId)?.deviceClass;
  }

  deviceClassByName(name: string): DeviceClass | undefined {
    return this.deviceClasses.find((deviceClass) => deviceClass.name === name);
  }

  get deviceClasses(): DeviceClass[] {
    return [...this.classes.values()].map(({ deviceClass }) => deviceClass);
  }
}

async function pluginFolders(directory: string): Promise<string[]> {
  const entries = await readdir(directory, { withFileTypes: true }).catch(() => []);
  const paths: string[] = [];
  for (const entry of entries.toSorted((a, b) => a.name.localeCompare(b.name))) {
    const path = join(directory, entry.name, "index.ts");
    if (entry.isDirectory() && (await Bun.file(path).exists())) paths.push(path);
  }
  return paths;
}

function locate(plugin: string, directory: string | undefined): string {
  if (isAbsolute(plugin)) return plugin;
  if (directory === undefined) {
    throw refusal(`plugin ${plugin}: npm names need "plugin-directory", the directory that holds node_modules`);
  }
  try {
    return Bun.resolveSync(plugin, directory);
  } catch (error) {
    throw refusal(`plugin ${plugin}: not found from ${directory}`, error);
  }
}

async function importPlugin(path: string): Promise<unknown> {
  try {
    return ((await import(path)) as { readonly default?: unknown }).default;
  } catch (error) {
    throw refusal(`plugin ${path} cannot be loaded: ${describeBuildError(error)}`, error);
  }
}

/** Bun says the place of a mistake in members of its own, several mistakes in a list. */
function describeBuildError(thrown: unknown): string {
  const { errors } = thrown as { readonly errors?: readonly unknown[] };
  const first: unknown = errors?.[0] ?? thrown;
  const { position } = first as { readonly position?: { readonly file: string; readonly line: number } | null };
  const place = position ? ` (${position.file}:${position.line})` : "";
  return `${asError(first).message}${place}`;
}

function checkPlugin(candidate: unknown, origin: string): Plugin {
  const mismatch = findMismatch(PluginSchema, candidate, "member");
  if (mismatch !== undefined) throw refusal(`plugin ${nameOf(candidate)}(${origin}): ${mismatch.message}`);
  const problem = findNonFunction(candidate as object, ["setup"]);
  if (problem !== undefined) throw refusal(`plugin ${nameOf(candidate)}(${origin}): ${problem}`);
  return candidate as Plugin;
}

function nameOf(candidate: unknown): string {
  const name = (candidate as { readonly name?: unknown } | null | undefined)?.name;
  return typeof name === "string" ? `${name} ` : "";
}

function refusal(message: string, cause?: unknown): VhostdError {
  return new VhostdError("invalid", message, {
    fix: "correct the plugin, or take it out of the configuration",
    ...(cause === undefined ? {} : { cause }),
  });
}

const exact = { additionalProperties: false } as const;
const Name = Type.String({ pattern: "^[a-z][a-z0-9-]*$", description: "lower-case letters, digits and dashes" });
/** The rest of the 64 belongs to the core. */
const ClassBit = Type.Union([
  Type.Integer({ minimum: 0, maximum: 23, description: "feature bit" }),
  Type.Integer({ minimum: 50, maximum: 63, description: "feature bit" }),
]);
/** Of one message: far more than any needs, far fewer than the system carries. */
const FDS_MAX = 8;
/** Members of a class that are functions and may be left out. */
const OPTIONAL_FUNCTIONS = [
  "describe",
  "countedQueues",
  "adminQueue",
  "receives",
  "stateFields",
  "comparedConfig",
  "linkUp",
] as const satisfies readonly (keyof DeviceClass)[];
const NumberKey = "^(0|[1-9][0-9]*)$";

const PluginSchema = Type.Object({ name: Name, apiVersion: Type.Literal(API_VERSION), setup: Type.Unknown() }, exact);

const DeviceClassSchema: TSchema = Type.Object(
  {
    name: Name,
    virtioId: Type.Integer({ minimum: 1, maximum: 0x3f, description: "virtio device id" }),
    configSpace: Type.Record(
      Type.String(),
      Type.Array(Type.Union([Type.Integer({ minimum: 0 }), Type.Enum(["u8", "u16", "u32", "u48", "u64"])]), {
        minItems: 2,
        maxItems: 2,
      }),
    ),
    features: Type.Object(
      {
        names: Type.Record(Type.String({ pattern: NumberKey }), Type.String()),
        add: Type.Optional(Type.Array(ClassBit)),
        hide: Type.Optional(Type.Array(ClassBit)),
      },
      exact,
    ),
    queues: Type.Unknown(),
    writableConfig: Type.Optional(Type.Array(Type.String())),
    protocolFeatures: Type.Optional(Type.Array(Type.Integer({ minimum: 0, maximum: 63 }))),
    messages: Type.Optional(
      Type.Record(
        Type.String({ pattern: NumberKey }),
        Type.Object(
          {
            name: Type.String(),
            size: Type.Integer({ minimum: 0 }),
            needs: Type.Optional(Type.Integer({ minimum: 0, maximum: 63 })),
            fds: Type.Optional(Type.Integer({ minimum: 0, maximum: FDS_MAX })),
            handle: Type.Unknown(),
          },
          exact,
        ),
      ),
    ),
    describe: Type.Optional(Type.Unknown()),
    countedQueues: Type.Optional(Type.Unknown()),
    adminQueue: Type.Optional(Type.Unknown()),
    receives: Type.Optional(Type.Unknown()),
    control: Type.Optional(
      Type.Object({ queue: Type.Unknown(), features: Type.Array(ClassBit), commands: Type.Unknown() }, exact),
    ),
    stateFields: Type.Optional(Type.Unknown()),
    comparedConfig: Type.Optional(Type.Unknown()),
    linkUp: Type.Optional(Type.Unknown()),
    softDevice: Type.Optional(
      Type.Object(
        {
          pciClass: Type.Integer({ minimum: 0, maximum: 0xffffff }),
          options: Type.Record(
            Type.String(),
            Type.Object(
              {
                type: Type.Enum(["string", "path", "number", "size", "boolean"]),
                description: Type.String(),
                default: Type.Optional(Type.Union([Type.String(), Type.Number(), Type.Boolean()])),
                live: Type.Optional(Type.Boolean()),
              },
              exact,
            ),
          ),
          create: Type.Unknown(),
        },
        exact,
      ),
    ),
  },
  exact,
);

/** What is wrong with a device class, or undefined. */
function findProblem(candidate: unknown): string | undefined {
  const mismatch = findMismatch(DeviceClassSchema, candidate, "member");
  if (mismatch !== undefined) return mismatch.message;
  const deviceClass = candidate as DeviceClass;
  const { configSpace, features, writableConfig = [], messages = {}, softDevice, control } = deviceClass;

  for (const [field, entry] of Object.entries(configSpace)) {
    if (typeof entry[0] !== "number" || typeof entry[1] !== "string") {
      return `member "configSpace.${field}" is ${JSON.stringify(entry)}, expected [offset, type]`;
    }
  }
  for (const bit of Object.keys(features.names).map(Number)) {
    if (bit > 63 || (bit > 23 && bit < 50)) {
      return `member "features.names" names bit ${bit}, a class has bits 0 to 23 and 50 to 63`;
    }
  }
  const unknown = writableConfig.find((field) => !Object.hasOwn(configSpace, field));
  if (unknown !== undefined) return `member "writableConfig" names ${unknown}, which is not in "configSpace"`;
  return (
    findNonFunction(deviceClass, ["queues"]) ??
    findNonFunction(
      deviceClass,
      OPTIONAL_FUNCTIONS.filter((member) => deviceClass[member] !== undefined),
    ) ??
    (control === undefined ? undefined : findNonFunction(control, ["queue", "commands"], "control.")) ??
    (softDevice === undefined ? undefined : findNonFunction(softDevice, ["create"], "softDevice.")) ??
    Object.entries(messages)
      .map(([number, message]) => findNonFunction(message, ["handle"], `messages.${number}.`))
      .find((problem) => problem !== undefined) ??
    findTaken(messages)
  );
}

function findTaken(messages: NonNullable<DeviceClass["messages"]>): string | undefined {
  const taken = Object.entries(Request).find(([, number]) => Object.hasOwn(messages, number));
  if (taken === undefined) return undefined;
  const [name, number] = taken;
  return `member "messages.${number}" would replace ${name} of the core, a class adds requests that the core lacks`;
}

const PolicySchema = Type.Object(
  { sideBySide: Type.Integer({ minimum: 1, maximum: 256 }), next: Type.Unknown(), fallback: Type.Unknown() },
  exact,
);

/** What of a policy of adoption is not as it should be, or undefined. */
function findPolicyProblem(candidate: unknown): string | undefined {
  const mismatch = findMismatch(PolicySchema, candidate, "member");
  return mismatch?.message ?? findNonFunction(candidate as object, ["next", "fallback"]);
}

function findNonFunction(object: object, members: readonly string[], prefix = ""): string | undefined {
  const found = members.find((member) => typeof (object as Record<string, unknown>)[member] !== "function");
  return found === undefined ? undefined : `member "${prefix}${found}" is not a function`;
}
