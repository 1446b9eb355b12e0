import { beforeEach, describe, expect, test } from "bun:test";
import { join } from "node:path";
import Value from "typebox/value";
import { silentLogger } from "../../../src/base/log.ts";
import { createMethods } from "../../../src/daemon/methods.ts";
import { rpcPage } from "../../../src/daemon/rpc-page.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import type { Call } from "../../../src/rpc/method.ts";
import { rejection } from "../../kit/rejection.ts";
import { FakeDevices, vfInfo } from "./fake-devices.ts";

const PF = parsePciAddress("0000:5a:00.0");
const VF = parsePciAddress("0000:5a:00.1");

let devices: FakeDevices;

beforeEach(() => {
  devices = new FakeDevices();
});

/** Calls a method and holds its result against the schema that is published. */
async function invoke(name: string, params?: unknown, call = caller().call): Promise<unknown> {
  const method = createMethods(devices, silentLogger).find((candidate) => candidate.name === name)!;
  const result = JSON.parse(JSON.stringify(await method.invoke(params, call)));
  expect(Value.Errors(method.result, result)).toEqual([]);
  return result;
}

function caller() {
  const notified: unknown[] = [];
  const notes: string[] = [];
  const closing: (() => void)[] = [];
  const call: Call = {
    client: "test",
    log: (text) => notes.push(text),
    notify: (method, params) => notified.push([method, params]),
    onClose: (handler) => closing.push(handler),
  };
  return {
    call,
    notified,
    notes,
    close() {
      for (const handler of closing) handler();
    },
  };
}

test("a change is noted with its parameters, a question is not", async () => {
  const { call, notes } = caller();
  await invoke("pf.add", { device: PF }, call);
  await invoke("pf.list", {}, call);
  await invoke("vf", { add: true, vfdev: VF, socket_file: "/tmp/a" }, call);
  await invoke("vf", { info: true, vfdev: VF }, call);
  await invoke("vf.remove", { device: VF }, call);
  expect(notes).toEqual([
    `pf.add {"device":"${PF}"}`,
    `vf {"add":true,"vfdev":"${VF}","socket_file":"/tmp/a"}`,
    `vf.remove {"device":"${VF}"}`,
  ]);
});

describe("typed methods", () => {
  test("a PF and a VF from add to remove", async () => {
    expect(await invoke("pf.add", { device: "5A:00.0" })).toMatchObject({ pf: PF, vfs: 0 });
    expect(await invoke("vf.add", { device: "5a:00.1" })).toMatchObject({
      vf: VF,
      socket_file: "/tmp/vf-0000:5a:00.1",
      mode: "client",
      device_feature: "0x80000110000020",
      driver_feature: null,
    });
    expect(await invoke("vf.list", {})).toMatchObject({ vfs: [{ vf: VF }] });
    expect(await invoke("vf.list", { pf: PF })).toMatchObject({ vfs: [{ vf: VF }] });
    expect(await invoke("vf.info", { device: VF })).toMatchObject({ vf: VF });
    expect(await invoke("stats", {})).toMatchObject({ pfs: 1, vfs: 1, sessions: 0, fds: expect.any(Number) });
    expect(await invoke("vf.remove", { device: VF })).toEqual({});
    expect(await invoke("pf.remove", { device: PF })).toEqual({});
    expect(await invoke("pf.list", {})).toEqual({ pfs: [] });
  });

  test("what queues have done: numbers everywhere, null where nobody counts", async () => {
    await invoke("pf.add", { device: PF });
    await invoke("vf.add", { device: VF });
    expect(await invoke("vf.info", { device: VF })).toMatchObject({ vf: VF, queue_stats: null });
    expect(await invoke("stats", { device: VF })).toMatchObject({ queue_stats: null });
    expect(await invoke("stats", {})).not.toHaveProperty("queue_stats");
    const busy = { received: 2 ** 40, completed: 9, bad: 1, bytes: 512 };
    devices.stats.set(VF, [{ received: 0, completed: 0, bad: 0, bytes: 0 }, busy]);
    const queue_stats = [expect.objectContaining({ queue: 0, received: 0 }), { queue: 1, ...busy }];
    expect(await invoke("vf.info", { device: VF })).toMatchObject({ queue_stats });
    expect(await invoke("stats", { device: VF })).toMatchObject({ vfs: 1, queue_stats });
    expect(await invoke("vf", { info: true, vfdev: VF })).toMatchObject({ device: { queue_stats } });
    expect(await rejection(invoke("stats", { device: "5a:00.7" }))).toMatchObject({ code: "vfNotFound" });
  });

  test("an address that is none", async () => {
    expect(await rejection(invoke("vf.info", { device: "eth0" }))).toMatchObject({ code: "badArguments" });
  });

  test("events go to a subscriber once, until it leaves", async () => {
    const { call, notified, close } = caller();
    await invoke("events.subscribe", {}, call);
    await invoke("pf.add", { device: PF });
    expect(notified).toEqual([["event", { type: "pf", pf: PF, state: "added" }]]);
    close();
    expect(devices.handlers.size).toBe(0);
  });

  test("subscribing twice on one connection is subscribing once", async () => {
    const methods = createMethods(devices, silentLogger);
    const subscribe = methods.find(({ name }) => name === "events.subscribe")!;
    const { call } = caller();
    await subscribe.invoke({}, call);
    await subscribe.invoke({}, call);
    expect(devices.handlers.size).toBe(1);
  });
});

describe("methods of old clients", () => {
  test("version", async () => {
    const version = (await invoke("version")) as Record<string, unknown>;
    expect(version).toMatchObject({ errno: 0, errstr: "Success", "vfe-vhostd version": version["version"] });
    expect(version["vfe-vhostd-ha version"]).toContain("not connected");
  });

  test("mgmtpf adds, lists and removes", async () => {
    const success = { errno: 0, errstr: "Success" };
    expect(await invoke("mgmtpf", { add: true, dev: "5a:00.0" })).toEqual(success);
    expect(await invoke("mgmtpf", { list: true })).toEqual({
      devices: [{ pf: PF, managed: true, migration: "vendor 1.0.0" }],
      ...success,
    });
    expect(await invoke("mgmtpf", { remove: true, dev: "5a:00.0" })).toEqual(success);
  });

  test("vf remove passes on what is to be warned of", async () => {
    const success = { errno: 0, errstr: "Success" };
    for (const [warning, answer] of [
      [undefined, success],
      ["held by process 4711", { warning: "held by process 4711", ...success }],
    ] as const) {
      await invoke("vf", { add: true, vfdev: VF, unmanaged: true });
      devices.warning = warning;
      expect(await invoke("vf", { remove: true, vfdev: VF })).toEqual(answer);
    }
  });

  test("vf info: numbers are strings, features are named by their bit in five columns", async () => {
    await invoke("mgmtpf", { add: true, dev: PF });
    await invoke("vf", { add: true, vfdev: VF, socket_file: "/tmp/vhost-net0", uuid: "u-u-i-d" });
    const device = {
      vf: VF,
      probed: true,
      msix_num: "10",
      queue_num: "8",
      queue_size: "256",
      device_feature: {
        value: "0x80000110000020",
        "    5": "VIRTIO_NET_F_MAC",
        "   28": "VIRTIO_RING_F_INDIRECT_DESC",
        "   32": "VIRTIO_F_VERSION_1",
        "   55": "unknown",
      },
      mtu: "1500",
      mac: "00:00:00:00:33:00",
      vm_uuid: "u-u-i-d",
      socket_file: "/tmp/vhost-net0",
      configured: false,
      managed: true,
      mover: "vendor",
    };
    const success = { errno: 0, errstr: "Success" };
    expect(await invoke("vf", { info: true, vfdev: VF })).toEqual({
      device: { ...device, queue_stats: null },
      ...success,
    });
    expect(await invoke("vf", { list: true, mgmtpf: PF })).toEqual({ devices: [device], errno: 0, errstr: "Success" });
  });

  test("a VF that waits for its restoration has four members", async () => {
    devices.vfs.set(VF, vfInfo(VF, PF, { probed: false }));
    expect(await invoke("vf", { info: true, vfdev: VF })).toMatchObject({
      device: { vf: VF, probed: false, vm_uuid: "", socket_file: "/tmp/vf-0000:5a:00.1" },
    });
    const { device } = (await invoke("vf", { info: true, vfdev: VF })) as { device: object };
    expect(Object.keys(device)).toEqual(["vf", "probed", "vm_uuid", "socket_file"]);
  });

  test("debug: run, quiesce, freeze and status, by number or text", async () => {
    await invoke("mgmtpf", { add: true, dev: PF });
    await invoke("vf", { add: true, vfdev: VF });
    const debug = (test_operation: number | string) => invoke("vf", { debug: true, vfdev: VF, test_operation });
    const answer = (lm_status: string) => ({ device: { vf: VF, lm_status }, errno: 0, errstr: "Success" });
    expect(await debug(6)).toEqual(answer("0"));
    expect(await debug("1")).toEqual(answer("1"));
    expect(await debug(2)).toEqual(answer("2"));
    expect(await debug(3)).toEqual(answer("3"));
    expect(await debug("6")).toEqual(answer("3"));
    expect(await invoke("vf.debug", { device: VF, operation: "run" })).toEqual({ vf: VF, internal_status: "running" });
  });

  test("debug: the pages that a VF writes", async () => {
    await invoke("mgmtpf", { add: true, dev: PF });
    await invoke("vf", { add: true, vfdev: VF });
    const debug = (test_operation: number | string, size_mode?: unknown) =>
      invoke("vf", { debug: true, vfdev: VF, test_operation, ...(size_mode === undefined ? {} : { size_mode }) });
    const answer = (more: object) => ({ device: { vf: VF, lm_status: "0", ...more }, errno: 0, errstr: "Success" });
    expect(await debug(4)).toEqual(answer({ log_mode: "pull-bitmap" }));
    expect(await debug("4", 1)).toEqual(answer({ log_mode: "pull-bitmap" }));
    expect(await debug(4, "2")).toEqual(answer({ log_mode: "pull-bytemap" }));
    expect(await debug(5)).toEqual(answer({ log_mode: "pull-bitmap", log_pages: "12", log_milliseconds: "3.25" }));
    expect(await invoke("vf.debug", { device: VF, operation: "start-logging", map: "bytemap" })).toEqual({
      vf: VF,
      internal_status: "init",
      logging: { mode: "pull-bytemap" },
    });
    expect(await invoke("vf.debug", { device: VF, operation: "stop-logging" })).toMatchObject({
      logging: { pages: 12, milliseconds: 3.25 },
    });
  });

  test("a VF whose VM migrates says so", async () => {
    const since = "2026-01-01T00:00:00.000Z";
    const phases = { begin_tracking: 1.5, tracking: 2000 };
    const migration = { state: "tracking", since, phases, dirty: { pages: 3, pages_per_second: 2 } } as const;
    devices.vfs.set(VF, vfInfo(VF, PF, { migration }));
    expect(await invoke("vf.info", { device: VF })).toMatchObject({ migration });
    expect(await invoke("vf", { info: true, vfdev: VF })).toMatchObject({ device: { migration } });
  });

  test("debug of a VF that is not managed says why not", async () => {
    devices.vfs.set(VF, vfInfo(VF, PF, { managed: false, unmanaged_reason: "its PF has no admin queue" }));
    expect(await invoke("vf", { debug: true, vfdev: VF, test_operation: 6 })).toMatchObject({
      errno: -95,
      errstr: expect.stringContaining("no admin queue"),
    });
  });

  test("server and the default socket", async () => {
    await invoke("mgmtpf", { add: true, dev: PF });
    await invoke("vf", { add: true, vfdev: "5a:00.1", server: true });
    expect(devices.vfInfo(VF)).toMatchObject({ mode: "server", socket_file: "/tmp/vf-0000:5a:00.1" });
  });

  test("without a PF, and without host notifier", async () => {
    expect(await invoke("vf", { add: true, vfdev: "5a:00.1", unmanaged: true, host_notifier: false })).toMatchObject({
      errno: 0,
    });
    expect(devices.vfInfo(VF)).toMatchObject({ pf: null, unmanaged: true, host_notifier: false });
    await invoke("mgmtpf", { add: true, dev: PF });
    await invoke("vf", { add: true, vfdev: "5a:00.2" });
    expect(await invoke("vf", { list: true, mgmtpf: PF })).toMatchObject({ devices: [{ vf: "0000:5a:00.2" }] });
    expect(await invoke("vf", { list: true, unmanaged: true })).toMatchObject({ devices: [{ vf: VF }] });
    expect(await invoke("vf", { list: true })).toMatchObject({
      errstr: "no PF is named",
      fix: expect.stringContaining("--unmanaged"),
    });
    expect(await invoke("vf.list", {})).toMatchObject({ vfs: [{ vf: VF }, { vf: "0000:5a:00.2" }] });
  });

  test("with a front-end that has messages of its own", async () => {
    await invoke("mgmtpf", { add: true, dev: PF });
    await invoke("vf", { add: true, vfdev: "5a:00.1", frontend: "nvidia-presetup" });
    await invoke("vf.add", { device: "5a:00.2" });
    expect(await invoke("vf.info", { device: "5a:00.1" })).toMatchObject({ frontend: "nvidia-presetup" });
    expect(await invoke("vf.info", { device: "5a:00.2" })).toMatchObject({ frontend: "standard" });
    expect(await invoke("vf", { add: true, vfdev: "5a:00.3", frontend: "presetup" })).toMatchObject({
      errstr: expect.stringContaining("nvidia-presetup"),
    });
  });

  const failures: [string, string, unknown, number][] = [
    ["no PF named", "mgmtpf", { add: true }, -1000],
    ["a PF that does not exist", "mgmtpf", { add: true, dev: "af:00.0" }, -1001],
    ["no VF named", "vf", { remove: true }, -1002],
    ["a VF that was not added", "vf", { info: true, vfdev: "5a:00.1" }, -1003],
    ["a VF before its PF", "vf", { add: true, vfdev: "5a:00.1" }, -1001],
    ["VFs of no PF", "vf", { list: true }, -1000],
    ["an address that is none", "vf", { info: true, vfdev: "eth0" }, -1007],
    ["no operation", "mgmtpf", {}, -1007],
    ["two operations", "vf", { add: true, remove: true, vfdev: "5a:00.1" }, -1007],
    ["a parameter of a wrong type", "vf", { info: true, vfdev: 5 }, -1007],
    ["an unknown parameter", "mgmtpf", { list: true, all: true }, -1007],
    ["debug of a VF that was not added", "vf", { debug: true, vfdev: "5a:00.1", test_operation: 6 }, -1003],
    ["debug without an operation", "vf", { debug: true, vfdev: "5a:00.1" }, -1007],
    ["debug with an unknown operation", "vf", { debug: true, vfdev: "5a:00.1", test_operation: 7 }, -1007],
    ["logging of a VF that was not added", "vf", { debug: true, vfdev: "5a:00.1", test_operation: 4 }, -1003],
  ];
  for (const [what, method, params, errno] of failures) {
    test(`${what}: errno ${errno} inside the result`, async () => {
      expect(await invoke(method, params)).toMatchObject({ errno, errstr: expect.stringMatching(/.{8}/) });
    });
  }
});

test("rpc.discover names every method with its parameters", async () => {
  const { methods } = (await invoke("rpc.discover", {})) as { methods: { name: string; params: { name: string }[] }[] };
  const byName = Object.fromEntries(methods.map(({ name, params }) => [name, params.map((param) => param.name)]));
  expect(byName).toMatchObject({
    "vf.add": ["device", "socket", "mode", "uuid", "unmanaged", "host_notifier", "frontend"],
    "rpc.discover": [],
    stats: ["device"],
  });
});

test("docs/rpc.md is what the schemas say", async () => {
  expect(await Bun.file(join(import.meta.dir, "../../../docs/rpc.md")).text()).toBe(rpcPage());
});
