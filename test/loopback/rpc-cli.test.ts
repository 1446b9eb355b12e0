import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { silentLogger } from "../../src/base/log.ts";
import { createMethods } from "../../src/daemon/methods.ts";
import { RpcServer } from "../../src/rpc/server.ts";
import { FakeDevices } from "../unit/rpc/fake-devices.ts";

const CLI = join(import.meta.dir, "../../bin/vfe-vhost-cli.ts");

let directory: string;
let devices: FakeDevices;
let server: RpcServer;

beforeEach(async () => {
  directory = mkdtempSync(join(tmpdir(), "vhostd-cli-"));
  devices = new FakeDevices();
  server = new RpcServer(createMethods(devices, silentLogger), { log: silentLogger });
  await server.listenUnix(join(directory, "rpc.sock"), 0o600);
});

afterEach(async () => {
  await server.stop(0);
  rmSync(directory, { recursive: true });
});

function start(args: readonly string[]) {
  return Bun.spawn([process.execPath, CLI, ...args], {
    env: { ...process.env, VFE_VHOSTD_RUNTIME_DIR: directory },
    cwd: directory,
    stdout: "pipe",
    stderr: "pipe",
  });
}

async function cli(...args: string[]) {
  const child = start(args);
  const [stdout, stderr, code] = await Promise.all([child.stdout.text(), child.stderr.text(), child.exited]);
  return { stdout, stderr, code, json: stdout.startsWith("{") ? JSON.parse(stdout) : undefined };
}

describe("the commands of the existing stack", () => {
  test("from the PF to the VF and back", async () => {
    expect(await cli("mgmtpf", "-a", "0000:5a:00.0")).toMatchObject({ code: 0, stderr: "" });
    const added = await cli("vf", "-v", "net0", "-u", "some-uuid", "-a", "5a:00.1");
    expect(added).toMatchObject({ code: 0, stdout: '{\n  "errno": 0,\n  "errstr": "Success"\n}\n', stderr: "" });
    expect((await cli("mgmtpf", "--list")).json).toMatchObject({ devices: [{ pf: "0000:5a:00.0" }], errno: 0 });
    expect((await cli("vf", "-l", "5a:00.0")).json.devices).toHaveLength(1);
    const { stdout, json } = await cli("vf", "-i", "0000:5a:00.1");
    expect(json.device).toMatchObject({ vm_uuid: "some-uuid", socket_file: join(directory, "net0"), queue_num: "8" });
    expect(stdout).toContain('\n      "    5": "VIRTIO_NET_F_MAC",\n');
    expect(await cli("mgmtpf", "-r", "5a:00.0")).toMatchObject({ code: 1, json: { errno: -1013 } });
    expect(await cli("vf", "--remove", "5a:00.1")).toMatchObject({ code: 0 });
    expect(await cli("mgmtpf", "-r", "5a:00.0")).toMatchObject({ code: 0 });
  });

  test("--server and the default socket", async () => {
    await cli("mgmtpf", "-a", "5a:00.0");
    await cli("vf", "-a", "5a:00.1", "--server");
    const { json } = await cli("call", "vf.info", '{"device":"5a:00.1"}');
    expect(json).toMatchObject({ mode: "server", socket_file: "/tmp/vf-0000:5a:00.1" });
  });

  test("version", async () => {
    expect((await cli("version")).json).toMatchObject({ "vfe-vhostd version": expect.any(String), errno: 0 });
  });

  const failures: [string[], number][] = [
    [["mgmtpf", "-a"], 1000],
    [["mgmtpf", "-a", "af:00.0"], 1001],
    [["mgmtpf", "-a", "eth0"], 1007],
    [["vf", "-a", "5a:00.1"], 1001],
    [["vf", "-i"], 1002],
    [["vf", "-i", "5a:00.1"], 1003],
    [["vf", "-d", "-o", "6", "5a:00.1"], 1003],
    [["vf", "-d", "5a:00.1"], 1007],
    [["vf", "-d", "-o", "5", "5a:00.1"], 1003],
  ];
  for (const [args, number] of failures) {
    test(`${args.join(" ")}: error ${number} on both outputs`, async () => {
      const { code, json, stderr } = await cli(...args);
      expect(code).toBe(1);
      expect(json).toEqual({ errno: -number, errstr: expect.any(String) });
      expect(stderr).toMatch(new RegExp(`^vfe-vhost-cli: .+ \\(error ${number}\\).*\n$`));
    });
  }

  for (const args of [
    [],
    ["nonsense"],
    ["mgmtpf"],
    ["vf", "-a", "-r", "x"],
    ["vf", "-q"],
    ["version", "--timeout", "-1"],
  ]) {
    test(`"${args.join(" ")}" is a usage error`, async () => {
      expect(await cli(...args)).toMatchObject({ code: 2, stdout: "", stderr: expect.stringContaining("usage: ") });
    });
  }

  test("help asks no daemon", async () => {
    for (const args of [["-h"], ["vf", "-h"], ["--runtime-dir", "/nowhere", "mgmtpf", "--help"]]) {
      expect(await cli(...args)).toMatchObject({ code: 0, stderr: "", stdout: expect.stringContaining("usage: ") });
    }
  });
});

describe("call and events", () => {
  test("a method by name, with its error", async () => {
    expect((await cli("call", "pf.list")).json).toEqual({ pfs: [] });
    const { code, stdout, stderr } = await cli("call", "vf.info", '{"device":1}');
    expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
    expect(stderr).toContain('parameter "device" is 1');
    expect(await cli("call", "no.such")).toMatchObject({ code: 1, stderr: expect.stringContaining("no.such") });
    expect(await cli("call", "pf.list", "{")).toMatchObject({ code: 2 });
  });

  test("events are printed line by line until the daemon goes", async () => {
    const child = start(["events"]);
    const subscribed = (async () => {
      while (devices.handlers.size === 0) await Bun.sleep(5);
    })();
    await subscribed;
    await cli("mgmtpf", "-a", "5a:00.0");
    await server.stop(0);
    expect(await child.stdout.text()).toBe('{"type":"pf","pf":"0000:5a:00.0","state":"added"}\n');
    expect(await child.stderr.text()).toContain("closed the connection");
    expect(await child.exited).toBe(1);
  });
});

describe("a daemon that is not well", () => {
  test("not running", async () => {
    await server.stop(0);
    const { code, json, stderr } = await cli("version");
    expect(code).toBe(1);
    expect(json).toMatchObject({ errno: -2 });
    expect(stderr).toContain("start the daemon");
  });

  test("gone, its socket left behind", async () => {
    await server.stop(0);
    const path = join(directory, "rpc.sock");
    const script = `require("node:net").createServer().listen(${JSON.stringify(path)}, () => process.kill(process.pid, "SIGKILL"))`;
    await Bun.spawn([process.execPath, "-e", script]).exited;
    expect(await cli("version")).toMatchObject({ code: 1, json: { errno: -111 } });
  });

  test("dies in the middle of a call", async () => {
    await devices.addPf("0000:5a:00.0" as never);
    const gate = Promise.withResolvers<void>();
    devices.gate = gate.promise;
    const child = start(["vf", "-a", "5a:00.1"]);
    while (server.clients === 0) await Bun.sleep(5);
    await Bun.sleep(20);
    await server.stop(0);
    gate.resolve();
    expect(JSON.parse(await child.stdout.text())).toMatchObject({ errno: -104 });
    expect(await child.stderr.text()).toContain("before it answered vf");
    expect(await child.exited).toBe(1);
  });

  test("does not answer", async () => {
    await devices.addPf("0000:5a:00.0" as never);
    const gate = Promise.withResolvers<void>();
    devices.gate = gate.promise;
    expect(await cli("--timeout", "0.3", "vf", "-a", "5a:00.1")).toMatchObject({ code: 1, json: { errno: -110 } });
    gate.resolve();
  });

  test("is something else", async () => {
    await server.stop(0);
    const other = createServer((socket) => void socket.on("error", () => {}).write("220 mail ready\r\n"));
    await new Promise<void>((resolve) => void other.listen(join(directory, "rpc.sock"), resolve));
    try {
      expect(await cli("version")).toMatchObject({ code: 1, json: { errno: -71 } });
    } finally {
      other.close();
    }
  });

  test("a path that is no socket", async () => {
    const elsewhere = mkdtempSync(join(directory, "x"));
    writeFileSync(join(elsewhere, "rpc.sock"), "");
    expect(await cli("--runtime-dir", elsewhere, "version")).toMatchObject({ code: 1, json: { errno: -111 } });
  });
});
