import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { loadConfig } from "../../../src/daemon/config.ts";
import { rejection } from "../../kit/rejection.ts";

let directory: string;
let file: string;

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "vhostd-config-"));
  file = join(directory, "vhostd.toml");
});

afterEach(() => rmSync(directory, { recursive: true }));

test("without a file there are the places of the system", async () => {
  expect(await loadConfig(undefined)).toEqual({
    runtimeDirectory: "/run/vfe-vhostd",
    busDirectories: ["/sys/bus/pci/devices", "/run/vfe-softvf/devices"],
    rpcTcp: undefined,
    logLevel: "info",
    plugins: [],
    pluginDirectory: undefined,
    stateDirectory: "/var/lib/vfe-vhostd",
    vfioInterface: "auto",
    vfToken: undefined,
    ha: "auto",
    pfs: [],
    vfs: [],
  });
});

const FULL = `
runtime-dir = "run"
bus = ["/sys/bus/pci/devices", "devices"]
rpc-tcp = "127.0.0.1:12190"
log-level = "debug"
plugins = ["./rng/index.ts", "vfe-plugin-rng"]
plugin-directory = "packages"
state-dir = "state"
vfio = "group"
vf-token = "D3B07384-1B4D-4C2B-9F0E-0A1B2C3D4E5F"
ha = "keeper"

[[pf]]
device = "5a:00.0"

[[vf]]
device = "5A:00.1"

[[vf]]
device = "5a:00.2"
socket = "/tmp/vm2"
mode = "server"
uuid = "ee8b6429-eb1e-45e7-9dab-aff843b99075"
unmanaged = true
host-notifier = false
frontend = "nvidia-presetup"
`;

test("every option; relative paths start at the file", async () => {
  writeFileSync(file, FULL);
  expect(await loadConfig(file)).toEqual({
    runtimeDirectory: join(directory, "run"),
    busDirectories: ["/sys/bus/pci/devices", join(directory, "devices")],
    rpcTcp: { host: "127.0.0.1", port: 12190 },
    logLevel: "debug",
    plugins: [join(directory, "rng/index.ts"), "vfe-plugin-rng"],
    pluginDirectory: join(directory, "packages"),
    stateDirectory: join(directory, "state"),
    vfioInterface: "group",
    vfToken: "d3b07384-1b4d-4c2b-9f0e-0a1b2c3d4e5f",
    ha: "keeper",
    pfs: ["0000:5a:00.0"],
    vfs: [
      { address: "0000:5a:00.1", socket: "/tmp/vf-0000:5a:00.1", mode: "client" },
      {
        address: "0000:5a:00.2",
        socket: "/tmp/vm2",
        mode: "server",
        uuid: "ee8b6429-eb1e-45e7-9dab-aff843b99075",
        unmanaged: true,
        hostNotifier: false,
        frontend: "nvidia-presetup",
      },
    ] as never,
  } as never);
});

test("the command line goes before the file", async () => {
  writeFileSync(file, FULL);
  const overrides = { runtimeDirectory: "/tmp/x", busDirectories: ["/b"], rpcTcp: "[::1]:1", logLevel: "warn" };
  expect(await loadConfig(file, overrides)).toMatchObject({
    runtimeDirectory: "/tmp/x",
    busDirectories: ["/b"],
    rpcTcp: { host: "::1", port: 1 },
    logLevel: "warn",
  });
});

describe("mistakes are named with their line", () => {
  const cases: [string, string, string][] = [
    ["an unknown key", `log-level = "info"\nrpc_tcp = "x"`, `vhostd.toml:2: key "rpc_tcp" is not known, known are:`],
    ["a wrong type", `bus = "/sys"`, `vhostd.toml:1: key "bus" is "/sys", expected a list`],
    ["a wrong word", `\nlog-level = "loud"`, `vhostd.toml:2: key "log-level" is "loud", expected "error" or "warn"`],
    ["a missing key in a table", `[[pf]]\ndevice = "a"\n\n[[pf]]\n`, `vhostd.toml:4: key "pf[1].device" is missing`],
    [
      "an unknown kind of front-end",
      `[[vf]]\ndevice = "a"\nfrontend = "qemu"`,
      `vhostd.toml:3: key "vf[0].frontend" is "qemu", expected "standard" or "nvidia-presetup"`,
    ],
    ["an unknown key in a table", `[[vf]]\ndevice = "a"\nmodus = "b"`, `vhostd.toml:3: key "vf[0].modus" is not known`],
    ["no TOML", "bus = [", "vhostd.toml: "],
    ["an address that is none", `[[pf]]\ndevice = "eth0"`, `vhostd.toml:2: "eth0" is not a PCI address`],
    [
      "a VF twice",
      `[[vf]]\ndevice = "0a:01.1"\n\n[[vf]]\ndevice = "0000:0a:01.1"`,
      "vhostd.toml:5: 0000:0a:01.1 stands twice",
    ],
    ["a VM that is no UUID", `[[vf]]\ndevice = "0a:01.1"\nuuid = "vm1"`, `vhostd.toml:2: "vm1" is not a UUID`],
    ["TCP for everyone", `rpc-tcp = "0.0.0.0:1"`, "not a loopback address"],
  ];
  for (const [what, text, message] of cases) {
    test(what, async () => {
      writeFileSync(file, text);
      expect((await rejection(loadConfig(file))).message).toContain(message);
    });
  }

  test("no file", async () => {
    expect((await rejection(loadConfig(file))).message).toContain(`${file} cannot be read: ENOENT`);
  });

  test("a log level of the command line", async () => {
    expect((await rejection(loadConfig(undefined, { logLevel: "toString" }))).message).toContain("not a log level");
  });
});
