import { afterAll, beforeAll, expect, test } from "bun:test";
import { mkdir, mkdtemp, rm, symlink } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parsePciAddress } from "../../../src/pci/address.ts";
import { Bus } from "../../../src/pci/bus.ts";
import { rejection } from "../../kit/rejection.ts";

let directory = "";
const PF = parsePciAddress("5a:00.0");
const VF = parsePciAddress("5a:00.1");

beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), "bus-"));
  const entry = async (address: string, device: string) => {
    await mkdir(join(directory, "soft", address), { recursive: true });
    await Bun.write(join(directory, "soft", address, "vendor"), "0x1af4\n");
    await Bun.write(join(directory, "soft", address, "device"), `${device}\n`);
    await Bun.write(join(directory, "soft", address, "class"), "0x010000\n");
  };
  await mkdir(join(directory, "empty"));
  await entry(PF, "0x1042");
  await entry(VF, "0x1042");
  for (let i = 0; i < 12; i++) {
    if (i === 3) continue;
    await symlink(`../0000:5a:0${Math.floor((i + 1) / 8)}.${(i + 1) % 8}`, join(directory, "soft", PF, `virtfn${i}`));
  }
  await symlink(`../${PF}`, join(directory, "soft", VF, "physfn"));
  await Bun.write(join(directory, "soft", VF, "vfio-user.sock"), "");
  await entry("0000:5a:1f.0", "rubbish");
});
afterAll(() => rm(directory, { recursive: true }));

test("functions are found by address, with their relations and transport", async () => {
  const bus = new Bus([join(directory, "missing"), join(directory, "empty"), join(directory, "soft")]);
  expect(await bus.find(parsePciAddress("00:00.0"))).toBeUndefined();
  expect(await bus.find(VF)).toMatchObject({
    vendor: 0x1af4,
    device: 0x1042,
    class: 0x010000,
    physfn: PF,
    virtfns: new Map(),
    transport: { kind: "vfio-user", socket: join(directory, "soft", VF, "vfio-user.sock") },
  });
  const pf = await bus.find(PF);
  expect(pf?.transport).toEqual({ kind: "vfio" });
  expect(pf?.physfn).toBeUndefined();
  expect(pf?.virtfns.get(11)).toBe(parsePciAddress("5a:01.4"));
  // The index is that of the link, whether or not the others are there.
  expect([...(pf?.virtfns.keys() ?? [])]).toEqual([0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]);
});

test("an attribute that is no number is named", async () => {
  const bus = new Bus([join(directory, "soft")]);
  expect((await rejection(bus.find(parsePciAddress("5a:1f.0")))).message).toMatch(/5a:1f.0\/device says "rubbish/);
});
