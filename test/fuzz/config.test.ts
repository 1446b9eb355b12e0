import { expect, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { isAbsolute, join } from "node:path";
import fc from "fast-check";
import { VhostdError } from "../../src/base/errors.ts";
import { LOG_LEVELS, silentLogger } from "../../src/base/log.ts";
import { loadConfig } from "../../src/daemon/config.ts";
import { parsePciAddress } from "../../src/pci/address.ts";
import { BUILT_IN_PLUGINS, PluginRegistry } from "../../src/plugin-host.ts";
import { readConfigFile, resolvePf } from "../../src/softvf/config.ts";
import { FUZZ_TIMEOUT, fuzz } from "../kit/fuzz.ts";

/** Values as TOML writes them: some that are right somewhere, many that are not. */
const text = fc.oneof(
  {
    weight: 5,
    arbitrary: fc.constantFrom("5a:00.0", "0000:5a:00.1", "5a:00.2", "/run/x", "x/y", "./p.ts", "npm-name"),
  },
  {
    weight: 5,
    arbitrary: fc.constantFrom(
      "127.0.0.1:12190",
      "[::1]:1",
      "0.0.0.0:1",
      "info",
      "debug",
      "client",
      "server",
      "blk",
      "4K",
    ),
  },
  { weight: 2, arbitrary: fc.constantFrom("", "__proto__", "toString", "\u0000", "x".repeat(300), "vm1", "-", ":") },
  { weight: 1, arbitrary: fc.string({ unit: "grapheme" }) },
);
const quoted = text.map((value) => JSON.stringify(value).replaceAll("\u007f", "\\u007f"));
const scalar = fc.oneof(
  { weight: 8, arbitrary: quoted },
  {
    weight: 2,
    arbitrary: fc.constantFrom("true", "false", "0", "1", "-1", "4", "65536", "1.5", "1e300", "nan", "inf"),
  },
  { weight: 1, arbitrary: fc.constantFrom("1979-05-27", "07:32:00", "0x10", "1_000", "99999999999999999999", "''") },
);
const value = fc.oneof(
  { weight: 6, arbitrary: scalar },
  { weight: 2, arbitrary: fc.array(scalar, { maxLength: 3 }).map((all) => `[${all.join(", ")}]`) },
  { weight: 1, arbitrary: scalar.map((inner) => `{ a = ${inner} }`) },
  { weight: 1, arbitrary: fc.constantFrom("", "[", "[[1], []]", "{", '"', "=", "\\", '"""x', "{ }") },
);

const line = (keys: readonly string[]) =>
  fc
    .tuple(
      fc.oneof(
        { weight: 12, arbitrary: fc.constantFrom(...keys) },
        { weight: 1, arbitrary: fc.constantFrom("nope", "__proto__", "constructor", "a.b", '""', '"vf[0].mode"', "#") },
      ),
      value,
    )
    .map(([key, content]) => `${key} = ${content}`);

/** A file of top lines and of tables, mostly each key once, and mostly with what is needed. */
function file(
  top: readonly string[],
  tables: Readonly<Record<string, readonly string[]>>,
  needed: readonly string[],
): fc.Arbitrary<string> {
  const present = fc.oneof(
    { weight: 8, arbitrary: fc.constant(needed) },
    { weight: 1, arbitrary: fc.subarray([...needed]) },
    { weight: 1, arbitrary: fc.constant([]) },
  );
  const table = fc.constantFrom(...Object.keys(tables)).chain((name) =>
    fc
      .tuple(
        fc.oneof(
          { weight: 9, arbitrary: fc.constant(`[[${name}]]`) },
          { weight: 1, arbitrary: fc.constantFrom(`[${name}]`, `[[${name}`, `[[${name}.x]]`, `[[ ${name} ]]`) },
        ),
        fc.uniqueArray(line(tables[name]!), { maxLength: 5, selector: (one) => one.split(" = ")[0] }),
        present,
      )
      .map(([header, lines, first]) => {
        const rest = lines.filter((one) => !first.some((other) => other.split(" = ")[0] === one.split(" = ")[0]));
        return [header, ...first, ...rest].join("\n");
      }),
  );
  return fc
    .tuple(
      fc.uniqueArray(line(top), { maxLength: 3, selector: (one) => one.split(" = ")[0] }),
      fc.array(table, { maxLength: 3 }),
      fc.oneof({ weight: 9, arbitrary: fc.constant("") }, { weight: 1, arbitrary: fc.string({ maxLength: 20 }) }),
    )
    .map(([lines, rest, garbage]) => [...lines, ...rest, garbage].join("\n"));
}

const COMMON = ["runtime-dir", "log-level", "plugins", "plugin-directory"];
const daemonFile = file(
  [...COMMON, "bus", "rpc-tcp", "pf", "vf"],
  { pf: ["device"], vf: ["device", "socket", "uuid", "mode"] },
  ['device = "5a:00.0"'],
);
const softvfFile = file(
  [...COMMON, "pf"],
  {
    pf: [
      ...["address", "class", "vfs", "disk", "queues", "ring-size", "size", "block-size", "slow", "out-of-order"],
      ...["vectors", "serial", "read-only"],
    ],
  },
  ['address = "5a:00.0"', 'class = "blk"'],
);

/** What a refusal must be: of this kind, with the file, and with what in it is wrong. */
function checkRefusal(error: unknown, path: string): void {
  if (!(error instanceof VhostdError)) throw error;
  expect(error.code).toBe("badArguments");
  expect(error.message).toStartWith(path);
  expect(error.message.length).toBeGreaterThan(path.length + 3);
}

async function inDirectory(run: (path: string) => Promise<void>): Promise<void> {
  const directory = mkdtempSync(join(tmpdir(), "config-"));
  try {
    await run(join(directory, "file.toml"));
  } finally {
    rmSync(directory, { recursive: true });
  }
}

test(
  "a configuration of the daemon is taken as it is documented, or refused by file and key",
  () =>
    inDirectory(async (path) => {
      const property = fc.asyncProperty(daemonFile, async (content) => {
        writeFileSync(path, content);
        const config = await loadConfig(path).catch((error) => checkRefusal(error, path));
        if (config === undefined) return;
        expect(Object.keys(LOG_LEVELS)).toContain(config.logLevel);
        for (const one of [
          config.runtimeDirectory,
          ...config.busDirectories,
          ...config.vfs.map(({ socket }) => socket),
        ]) {
          expect(isAbsolute(one)).toBe(true);
        }
        for (const address of [...config.pfs, ...config.vfs.map((vf) => vf.address)]) {
          expect(parsePciAddress(address)).toBe(address);
        }
        for (const { mode } of config.vfs) expect(["client", "server"]).toContain(mode);
        if (config.rpcTcp !== undefined) expect(config.rpcTcp.host).toMatch(/^(127\.|::1$)/);
      });
      await fuzz("daemon configuration", property);
    }),
  FUZZ_TIMEOUT,
);

test(
  "a configuration of vfe-softvf is taken as it is documented, or refused by file and key",
  () =>
    inDirectory(async (path) => {
      const registry = await PluginRegistry.load({ builtIn: BUILT_IN_PLUGINS, plugins: [] }, silentLogger);
      const property = fc.asyncProperty(softvfFile, async (content) => {
        writeFileSync(path, content);
        const config = await readConfigFile(path).catch((error) => checkRefusal(error, path));
        if (config === undefined) return;
        expect(isAbsolute(config.runtimeDirectory)).toBe(true);
        expect(config.pfs.length).toBeGreaterThan(0);
        for (const pf of config.pfs) {
          expect(pf.vfs).toBeWithin(0, 0x10000);
          try {
            resolvePf(pf, registry);
          } catch (error) {
            // The class is known later than the file: its options are named, the file is not.
            if (!(error instanceof VhostdError)) throw error;
            expect(error.code).toBe("badArguments");
            expect(error.message).not.toBe("");
          }
        }
      });
      await fuzz("softvf configuration", property);
    }),
  FUZZ_TIMEOUT,
);
