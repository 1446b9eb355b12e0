import { describe, expect, test } from "bun:test";
import net from "../../../plugins/net/index.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import type { DeviceClass, SoftOptionValues } from "../../../src/plugin.ts";
import { optionsOfVf } from "../../../src/softvf/class-options.ts";
import { configValues } from "../../../src/virtio/config-space.ts";
import { describeFeatures } from "../../../src/virtio/features.ts";

const classes: DeviceClass[] = [];
net.setup({ deviceClass: (registered) => void classes.push(registered), adoption() {} });
const { softDevice, configSpace, features } = classes[0]!;

function create(given: SoftOptionValues, vf = 0, pf = "0000:5a:00.0") {
  const place = { pf: parsePciAddress(pf), vf };
  return softDevice!.create(optionsOfVf(softDevice!, { backend: "echo", ...given }, place));
}
const parametersOf = (...of: Parameters<typeof create>) => create(...of).worker.parameters;
const offered = (given: SoftOptionValues) => describeFeatures(create(given).features, features.names);
const configOf = (device: ReturnType<typeof create>) => configValues(configSpace, device.config());

describe("a network card", () => {
  test("has pairs and a control queue behind them, as its configuration space says", () => {
    const device = create({ queues: 4, mtu: 9000, duplex: "half" }, 5);
    expect(device.queues).toBe(9);
    expect(configOf(device)).toMatchObject({
      ...{ mac: 0x050000000002n, maxVirtqueuePairs: 4, mtu: 9000, speed: 10_000, duplex: 0, status: 0 },
    });
    expect(device.worker).toEqual({
      name: "net",
      parameters: {
        ...{ backend: "echo", pairs: 4, mac: 0x050000000002n, mtu: 9000, link: true },
        ...{ promiscuous: false, pairsInUse: 1 },
      },
    });
    expect(create({ queues: 2, controlQueue: false }).queues).toBe(4);
  });

  test("offers what its backend can do", () => {
    const always = ["MTU", "MAC", "MRG_RXBUF", "STATUS"];
    expect(offered({})).toEqual([...always, "CTRL_VQ", "CTRL_RX", "SPEED_DUPLEX"]);
    expect(offered({ backend: "wire", queues: 2 })).toEqual([...always, "CTRL_VQ", "CTRL_RX", "MQ", "SPEED_DUPLEX"]);
    expect(offered({ controlQueue: false, queues: 2 })).toEqual([...always, "MQ", "SPEED_DUPLEX"]);
    const offloads = ["GUEST_TSO4", "GUEST_TSO6", "GUEST_ECN", "HOST_TSO4", "HOST_TSO6", "HOST_ECN"];
    expect(offered({ backend: "tap", tap: "tap0" })).toEqual([
      ...["CSUM", "GUEST_CSUM", "MTU", "MAC", ...offloads, "MRG_RXBUF", "STATUS", "CTRL_VQ", "CTRL_RX", "SPEED_DUPLEX"],
    ]);
  });

  test("is at the end of a wire that its neighbour has, too", () => {
    const wires = (wire?: string, pf?: string) =>
      [0, 1, 2, 3].map((vf) => {
        return parametersOf({ backend: "wire", ...(wire === undefined ? {} : { wire }) }, vf, pf)["wire"];
      });
    expect(wires()).toEqual(["0000:5a:00.0/0", "0000:5a:00.0/0", "0000:5a:00.0/1", "0000:5a:00.0/1"]);
    // Another PF has wires of its own.
    expect(new Set([...wires(), ...wires(undefined, "0000:5b:00.0")]).size).toBe(4);
    expect(wires("b{vf}")).toEqual(["b0", "b0", "b1", "b1"]);
    expect(wires("cable")).toEqual(["cable", "cable", "cable", "cable"]);
    expect(parametersOf({ backend: "tap", tap: "vf{vf}" }, 3)).toMatchObject({ backend: "tap", tap: "vf3" });
  });

  test("changes while it runs, and the driver is told of what it sees", () => {
    const device = create({});
    expect(device.carrierChanged?.(true)).toEqual({ configChanged: true });
    expect(configOf(device)).toMatchObject({ status: 1 });
    expect(device.carrierChanged?.(true)).toEqual({ configChanged: false });
    expect(device.set("link", false)).toEqual({ configChanged: true, parameters: { link: false } });
    expect(configOf(device)).toMatchObject({ status: 0 });
    expect(device.carrierChanged?.(false)).toEqual({ configChanged: false });
    expect(device.set("link", true)).toEqual({ configChanged: false, parameters: { link: true } });
    expect(device.set("mtu", 68)).toEqual({ configChanged: true, parameters: { mtu: 68 } });
    const mac = 0x0100aabbcc02n;
    expect(device.set("mac", "02:cc:bb:aa:00:00+1")).toEqual({ configChanged: true, parameters: { mac } });
    expect(configOf(device)).toMatchObject({ mtu: 68, mac });
    expect(() => device.set("speed", 1)).toThrow("option speed cannot be set while");
  });

  test("receives what a restored state says, until it is reset", () => {
    const device = create({});
    const mode = (bits: number) => ({ type: 4, bytes: Uint8Array.of(bits, 0, 0, 0) });
    expect([0, 1].map((promiscuous) => device.stateFields?.({ promiscuous }))).toEqual([[mode(0)], [mode(1)]]);
    const restored = (promiscuous: boolean) => ({ parameters: { promiscuous, pairsInUse: 0 } });
    expect(device.restoreFields?.([{ type: 5, bytes: new Uint8Array(2) }, mode(3)])).toEqual(restored(true));
    expect(device.restoreFields?.([mode(2)])).toEqual(restored(false));
    expect(device.restoreFields?.([])).toEqual(restored(false));
    expect(() => device.restoreFields?.([{ type: 4, bytes: new Uint8Array(3) }])).toThrow("3 bytes, 4 are needed");
    expect(device.reset?.()).toEqual({ parameters: { promiscuous: false, pairsInUse: 1 } });
  });

  const bad: [SoftOptionValues, string][] = [
    [{ backend: "bridge" }, 'option backend is "bridge", must be one of tap, wire, echo'],
    [{ backend: "tap" }, "option tap is missing"],
    [{ backend: "tap", tap: "an-interface-too-long" }, "1 to 15 characters"],
    [{ backend: "tap", tap: "a b" }, "1 to 15 characters"],
    [{ backend: "tap", tap: "tap%d" }, "1 to 15 characters"],
    [{ backend: "wire", wire: "w".repeat(65) }, "at most 64"],
    [{ queues: 257 }, "option queues is 257, must be from 1 to 256"],
    [{ mtu: 67 }, "option mtu is 67, must be from 68 to 65535"],
    [{ mtu: 65_536 }, "must be from 68 to 65535"],
    [{ mac: "02:00:00:00:00" }, 'option mac is "02:00:00:00:00", must be like'],
    [{ mac: "02:00:00:ff:ff:ff+1" }, "must be like"],
    [{ mac: "00:00:00:00:00:00" }, "all zeroes"],
    [{ mac: "33:33:00:00:00:01" }, "a group address"],
    [{ speed: 2 ** 31 }, "option speed is 2147483648"],
    [{ duplex: "both" }, "must be half or full"],
  ];
  test.each(bad)("does not take %j", (given, reason) => {
    expect(() => create(given)).toThrow(reason);
  });

  test("says before it is set what does not fit", () => {
    const device = create({});
    expect(() => device.check?.("mac", "ff:ff:ff:ff:ff:ff")).toThrow("a group address");
    expect(() => device.check?.("mtu", 1)).toThrow("must be from 68");
    device.check?.("link", false);
  });
});
