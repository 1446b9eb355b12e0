import { dirname, isAbsolute, resolve } from "node:path";
import Type, { type Static } from "typebox";
import { asError, errnoText, VhostdError } from "../base/errors.ts";
import { LOG_LEVELS, type LogLevel } from "../base/log.ts";
import { type PciAddress, parsePciAddress } from "../pci/address.ts";
import type { VfioInterface } from "../pci/vfio/address-space.ts";
import { findMismatch } from "../rpc/mismatch.ts";
import { type LoopbackAddress, parseLoopbackAddress } from "../rpc/tcp-address.ts";
import { DEFAULT_RUNTIME_DIRECTORY } from "../runtime-directory.ts";
import { defaultSocket } from "./default-socket.ts";
import { FRONTENDS, type FrontendKind, namedFrontend } from "./front-end-kind.ts";
import { parseVfToken, parseVmUuid } from "./uuid.ts";

/** What the daemon runs with. Paths are absolute. */
export interface DaemonConfig {
  /** Sockets and state. */
  readonly runtimeDirectory: string;
  /** Directories laid out like /sys/bus/pci/devices, asked in this order. */
  readonly busDirectories: readonly string[];
  /** undefined: no TCP. */
  readonly rpcTcp: LoopbackAddress | undefined;
  readonly logLevel: LogLevel;
  /** Absolute paths and npm names. */
  readonly plugins: readonly string[];
  /** Where npm names of plugins are resolved from. */
  readonly pluginDirectory: string | undefined;
  /** What outlives a reboot: the generated vf-token. */
  readonly stateDirectory: string;
  /** By which of the kernel's interfaces functions of this machine are opened. */
  readonly vfioInterface: VfioInterface;
  /** The secret that PFs and their VFs are opened with; undefined: one that the daemon makes itself. */
  readonly vfToken: string | undefined;
  /** Who keeps what a daemon after this one needs to go on. */
  readonly ha: HaKind;
  /** Added when the daemon starts, PFs first. */
  readonly pfs: readonly PciAddress[];
  readonly vfs: readonly ConfiguredVf[];
}

interface ConfiguredVf {
  readonly address: PciAddress;
  readonly socket: string;
  readonly mode: "client" | "server";
  readonly uuid?: string;
  readonly unmanaged?: true;
  readonly hostNotifier?: false;
  readonly frontend?: FrontendKind;
}

/**
 * "auto": vfe-vhostd-ha where it runs, or else systemd's fd store where there is one; "keeper": vfe-vhostd-ha only; "fd-store":
 * the fd store only; "off": nobody.
 */
export type HaKind = (typeof HA_KINDS)[number];
export const HA_KINDS = ["auto", "keeper", "fd-store", "off"] as const;

export const DEFAULT_STATE_DIRECTORY = "/var/lib/vfe-vhostd";
export const VFIO_INTERFACES: readonly VfioInterface[] = ["auto", "group", "iommufd"];
export const DEFAULT_BUS_DIRECTORIES: readonly string[] = ["/sys/bus/pci/devices", "/run/vfe-softvf/devices"];

const exact = { additionalProperties: false } as const;
const Path = Type.String({ minLength: 1, description: "path" });
const Device = Type.String({ minLength: 1, description: "PCI address" });

/** The configuration file, as TOML gives it. Relative paths in it start at its own directory. */
const ConfigFile = Type.Object(
  {
    "runtime-dir": Type.Optional(Path),
    bus: Type.Optional(Type.Array(Path, { minItems: 1 })),
    "rpc-tcp": Type.Optional(Type.String({ description: "HOST:PORT on loopback" })),
    "log-level": Type.Optional(Type.Enum(Object.keys(LOG_LEVELS) as LogLevel[])),
    plugins: Type.Optional(Type.Array(Type.String({ minLength: 1, description: "path or npm name" }))),
    "plugin-directory": Type.Optional(Path),
    "state-dir": Type.Optional(Path),
    vfio: Type.Optional(Type.Enum([...VFIO_INTERFACES])),
    "vf-token": Type.Optional(Type.String({ description: "UUID" })),
    ha: Type.Optional(Type.Enum([...HA_KINDS])),
    pf: Type.Optional(Type.Array(Type.Object({ device: Device }, exact))),
    vf: Type.Optional(
      Type.Array(
        Type.Object(
          {
            device: Device,
            socket: Type.Optional(Path),
            uuid: Type.Optional(Type.String({ description: "VM UUID" })),
            mode: Type.Optional(Type.Union([Type.Literal("client"), Type.Literal("server")])),
            unmanaged: Type.Optional(Type.Boolean()),
            "host-notifier": Type.Optional(Type.Boolean()),
            frontend: Type.Optional(Type.Enum([...FRONTENDS])),
          },
          exact,
        ),
      ),
    ),
  },
  exact,
);
type ConfigFile = Static<typeof ConfigFile>;

/** What the command line says; it goes before the file. */
export interface ConfigOverrides {
  readonly runtimeDirectory?: string | undefined;
  readonly busDirectories?: readonly string[] | undefined;
  readonly rpcTcp?: string | undefined;
  readonly logLevel?: string | undefined;
  readonly stateDirectory?: string | undefined;
  readonly vfio?: string | undefined;
  readonly ha?: string | undefined;
}

/**
 * Reads the configuration of the daemon.
 * @param file path of a TOML file, if there is one
 * @throws VhostdError that names file, line and key
 */
export async function loadConfig(file: string | undefined, overrides: ConfigOverrides = {}): Promise<DaemonConfig> {
  const text = file === undefined ? "" : await readText(file);
  const read = file === undefined ? {} : parseConfigFile(text, file);
  const here = file === undefined ? process.cwd() : dirname(resolve(file));
  const inFile = (path: string) => resolve(here, path);

  const rpcTcp = overrides.rpcTcp ?? read["rpc-tcp"];
  const buses = overrides.busDirectories ?? read.bus?.map(inFile) ?? DEFAULT_BUS_DIRECTORIES;
  return {
    runtimeDirectory: resolve(overrides.runtimeDirectory ?? inFile(read["runtime-dir"] ?? DEFAULT_RUNTIME_DIRECTORY)),
    busDirectories: buses.map((path) => resolve(path)),
    rpcTcp: rpcTcp === undefined ? undefined : atKey("rpc-tcp", overrides.rpcTcp, () => parseLoopbackAddress(rpcTcp)),
    logLevel: overrides.logLevel === undefined ? (read["log-level"] ?? "info") : parseLogLevel(overrides.logLevel),
    plugins: (read.plugins ?? []).map((plugin) => (isPath(plugin) ? inFile(plugin) : plugin)),
    pluginDirectory: read["plugin-directory"] === undefined ? undefined : inFile(read["plugin-directory"]),
    stateDirectory: resolve(overrides.stateDirectory ?? inFile(read["state-dir"] ?? DEFAULT_STATE_DIRECTORY)),
    vfioInterface: overrides.vfio === undefined ? (read.vfio ?? "auto") : parseVfioInterface(overrides.vfio),
    vfToken: atKey("vf-token", undefined, () => parseVfToken(read["vf-token"])),
    ha: overrides.ha === undefined ? (read.ha ?? "auto") : parseHaKind(overrides.ha),
    pfs: entries("pf", read.pf ?? [], ({ device }) => parsePciAddress(device)),
    vfs: entries("vf", read.vf ?? [], (entry) => {
      const { device, socket, uuid, mode = "client" } = entry;
      const address = parsePciAddress(device);
      const vm = parseVmUuid(uuid);
      return {
        address,
        socket: socket === undefined ? defaultSocket(address) : inFile(socket),
        mode,
        ...(vm === undefined ? {} : { uuid: vm }),
        ...(entry.unmanaged === true ? { unmanaged: true } : {}),
        ...(entry["host-notifier"] === false ? { hostNotifier: false } : {}),
        ...namedFrontend(entry.frontend),
      };
    }),
  };

  /** What is wrong with a key of the file is said with its place. */
  function atKey<T>(key: string, override: string | undefined, parse: () => T): T {
    try {
      return parse();
    } catch (error) {
      if (file === undefined || override !== undefined || !(error instanceof VhostdError)) throw error;
      const where = place(file, lineOf(text, key));
      const fix = error.fix === undefined ? {} : { fix: error.fix };
      throw new VhostdError("badArguments", `${where}: key "${key}": ${error.message}`, { cause: error, ...fix });
    }
  }

  /** What is wrong with an entry is said with its place; a device that stands twice is a mistake. */
  function entries<T extends { readonly device: string }, R>(
    table: string,
    list: readonly T[],
    convert: (entry: T) => R,
  ): R[] {
    const seen = new Set<string>();
    return list.map((entry, index) => {
      try {
        const address = parsePciAddress(entry.device);
        if (seen.has(address)) throw new VhostdError("badArguments", `${address} stands twice`);
        seen.add(address);
        return convert(entry);
      } catch (error) {
        if (!(error instanceof VhostdError)) throw error;
        const line = lineOf(text, `${table}[${index}].device`);
        throw new VhostdError("badArguments", `${place(file ?? "", line)}: ${error.message}`, { cause: error });
      }
    });
  }
}

/** @throws VhostdError badArguments */
function parseConfigFile(text: string, file: string): ConfigFile {
  let value: unknown;
  try {
    value = Bun.TOML.parse(text);
  } catch (error) {
    throw new VhostdError("badArguments", `${file}: ${asError(error).message}`, { cause: error });
  }
  const mismatch = findMismatch(ConfigFile, value, "key");
  if (mismatch === undefined) return value as ConfigFile;
  const line = lineOf(text, mismatch.path);
  throw new VhostdError("badArguments", `${place(file, line)}: ${mismatch.message}`);
}

function place(file: string, line: number | undefined): string {
  return line === undefined ? file : `${file}:${line}`;
}

async function readText(file: string): Promise<string> {
  try {
    return await Bun.file(file).text();
  } catch (error) {
    const errno = Math.abs((error as { readonly errno?: number }).errno ?? 5);
    throw new VhostdError(errno, `the configuration ${file} cannot be read: ${errnoText(errno)}`, { cause: error });
  }
}

function parseLogLevel(text: string): LogLevel {
  if (Object.hasOwn(LOG_LEVELS, text)) return text as LogLevel;
  throw new VhostdError("badArguments", `"${text}" is not a log level`, {
    fix: `use one of: ${Object.keys(LOG_LEVELS).join(", ")}`,
  });
}

function parseVfioInterface(text: string): VfioInterface {
  const found = VFIO_INTERFACES.find((name) => name === text);
  if (found !== undefined) return found;
  throw new VhostdError("badArguments", `"${text}" is not an interface of VFIO`, {
    fix: `use one of: ${VFIO_INTERFACES.join(", ")}`,
  });
}

function parseHaKind(text: string): HaKind {
  const found = HA_KINDS.find((name) => name === text);
  if (found !== undefined) return found;
  throw new VhostdError("badArguments", `"${text}" is no way to keep anything`, {
    fix: `use one of: ${HA_KINDS.join(", ")}`,
  });
}

/** npm names begin with a letter or @. */
function isPath(plugin: string): boolean {
  return isAbsolute(plugin) || plugin.startsWith(".");
}

/**
 * The line where a key such as `vf[1].mode` stands, counted from 1. The TOML parser keeps no positions, so the text is
 * searched: good for a hint, not more.
 */
function lineOf(text: string, path: string): number | undefined {
  const lines = text.split("\n");
  const [, table, index, key] = /^(\w+)\[(\d+)\](?:\.(.+))?$/.exec(path) ?? [];
  if (table === undefined) return findKey(lines, path, 0);
  const headers = lines.flatMap((line, at) => (line.replaceAll(/\s/g, "").startsWith(`[[${table}]]`) ? [at] : []));
  const header = headers[Number(index)];
  if (header === undefined) return findKey(lines, table, 0);
  return (key === undefined ? undefined : findKey(lines, key, header)) ?? header + 1;
}

/** @param from index of the first line to look at */
function findKey(lines: readonly string[], key: string, from: number): number | undefined {
  const at = lines.findIndex((line, index) => {
    const start = line.replace(/^[\s["']+/, "");
    return index >= from && start.startsWith(key) && /^["']?\s*[=\].]/.test(start.slice(key.length));
  });
  return at < 0 ? undefined : at + 1;
}
