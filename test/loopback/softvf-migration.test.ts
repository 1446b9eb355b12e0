import { expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import { type PciAddress, parsePciAddress } from "../../src/pci/address.ts";
import { decodeState, type VendorState } from "../../src/virtio/admin/state-blob.ts";
import { RawAdmin } from "./softvf-admin.ts";
import type { Reachable } from "./softvf-driver.ts";
import { MovedGuest } from "./softvf-guest.ts";
import { run, serve, workspace } from "./softvf-process.ts";

const PF = "0000:5a:00.0";
const VF = ["0000:5a:00.1", "0000:5a:00.2"] as const;

/** A real vfe-softvf: two VFs with the same disk, two queues each. */
async function serveTwo(...options: readonly string[]) {
  await using stack = new AsyncDisposableStack();
  const space = stack.use(await workspace("disk"));
  const place = ["--runtime-dir", space.path("run")];
  const args = ["--pf", PF, "--class", "blk", "--vfs", "2", "--disk", space.path("disk"), "--size", "16M"];
  const program = stack.use(await serve(...args, "--queues", "2", ...options, ...place));
  const reach = (address: string): Reachable => ({
    address: parsePciAddress(address) as PciAddress,
    server: { path: space.path(`run/devices/${address}/vfio-user.sock`) },
  });
  const resources = stack.move();
  return {
    pf: reach(PF),
    vfs: VF.map(reach),
    program,
    command: (name: string, ...rest: readonly string[]) => run(name, ...rest, ...place),
    [Symbol.asyncDispose]: () => resources.disposeAsync(),
  };
}

/** Brings a frozen state into a VF and lets it run. */
async function begin(admin: RawAdmin, vf: number, blob: Uint8Array, guest: MovedGuest): Promise<void> {
  await admin.steps(vf, "quiesced", "freezed");
  expect(await admin.restore(vf, blob)).toBe(0);
  await admin.steps(vf, "quiesced", "running");
  guest.wake();
}

const inFlight = (state: VendorState) =>
  state.indices
    .map(({ lastAvail, lastUsed }) => (lastAvail - lastUsed) & 0xffff)
    .reduce((sum, count) => sum + count, 0);

/** As an administrator must who gets no list: freezes again and again until nothing is in flight. */
async function freezeDrained(admin: RawAdmin, vf: number): Promise<VendorState> {
  return Deadline.after(10_000, "a drained device").poll(async () => {
    await admin.steps(vf, "freezed");
    const state = decodeState(await admin.save(vf));
    if (inFlight(state) === 0) return state;
    await admin.steps(vf, "quiesced");
    return undefined;
  }, 1);
}

for (const [freeze, ...device] of [
  ["drain"],
  ["drain", "--slow", "5", "--out-of-order"],
  ["list"],
  ["list", "--slow", "5", "--out-of-order"],
  ["hold", "--slow", "5", "--out-of-order"],
] as const) {
  test(`a loaded VF moves to another and back, no request lost or done twice: ${[freeze, ...device].join(" ")}`, async () => {
    await using softvf = await serveTwo("--freeze", freeze, ...device);
    await using admin = await RawAdmin.open(softvf.pf);
    await using guest = new MovedGuest(65_535);
    await guest.plug(softvf.vfs[0]!);
    await begin(admin, 0, guest.blob(), guest);
    expect(await guest.device!.status()).toBe(0x0f);
    guest.load(8);
    let listed = 0;
    let here = 0;
    for (let round = 0; round < 6; round++) {
      await guest.progress(30);
      await admin.steps(here, "quiesced");
      if (freeze === "hold") await freezeDrained(admin, here);
      else await admin.steps(here, "freezed");
      const before = guest.used;
      const blob = await admin.save(here, 1000);
      const state = decodeState(blob);
      expect(state.indices.map(({ lastUsed }) => lastUsed)).toEqual(before);
      listed += state.inFlight.reduce((sum, { heads }) => sum + heads.length, 0);
      expect(state.inFlight.reduce((sum, { heads }) => sum + heads.length, 0)).toBe(inFlight(state));
      // What is final stays so.
      await Bun.sleep(5);
      expect(guest.used).toEqual(before);
      await guest.unplug();
      here = 1 - here;
      await guest.plug(softvf.vfs[here]!);
      await begin(admin, here, blob, guest);
    }
    await guest.settle();
    if (freeze === "drain") expect(listed).toBe(0);
    if (freeze === "list" && device.length > 0) expect(listed).toBeGreaterThan(0);
  }, 30_000);
}

test("a VF freezes and goes on in its place, at any index, with a device that keeps what it has", async () => {
  await using softvf = await serveTwo("--freeze", "list", "--slow", "3", "--out-of-order");
  await using admin = await RawAdmin.open(softvf.pf);
  for (const index of [1, 40_000, 65_535]) {
    await using guest = new MovedGuest(index);
    await guest.plug(softvf.vfs[0]!);
    await begin(admin, 0, guest.blob(), guest);
    guest.load(8);
    for (let round = 0; round < 10; round++) {
      await guest.progress(20);
      await admin.steps(0, "quiesced", "freezed", "quiesced", "running");
    }
    await guest.settle();
    expect(guest.used).not.toEqual([index, index]);
  }
}, 30_000);

test("list and set know of the internal status and the PF's options", async () => {
  await using softvf = await serveTwo("--freeze", "hold");
  await using admin = await RawAdmin.open(softvf.pf);
  await admin.steps(1, "quiesced", "freezed");
  const { out } = await softvf.command("list");
  expect(out).toMatch(/5a:00.0 +pf +blk +in use +status 0x0f +- /);
  expect(out).toMatch(/5a:00.1 +vf +blk +free +status 0x00 +init /);
  expect(out).toMatch(/5a:00.2 +vf +blk +free +status 0x00 +freezed /);
  expect(await softvf.command("set", PF, "freeze=list", "admin-fault=status@0:fail:1")).toMatchObject({ code: 0 });
  expect([await admin.status(0), await admin.status(0)]).toEqual([0x85, "init"]);
  expect(await softvf.command("set", PF, "admin-fault=status:retry")).toMatchObject({ code: 0 });
  expect(await softvf.command("set", PF, "admin-fault=")).toMatchObject({ code: 0 });
  expect(await admin.status(0)).toBe("init");
  for (const [setting, reason] of [
    ["migration=none", "option migration cannot be set while the device runs; these can: freeze, admin-delay, admin"],
    ["slow=5", "a PF has no option slow"],
    ["freeze=often", 'option freeze is "often", must be one of drain, list, hold'],
    ["admin-fault=save:never", 'option admin-fault has "save:never", must be COMMAND[@VF]:retry|fail|silence'],
    ["admin-delay=stop=5", 'option admin-delay has "stop", must be one of identity, status'],
  ] as const) {
    const { code, err } = await softvf.command("set", PF, setting);
    expect(err).toContain(reason);
    expect(code).toBe(1);
  }
}, 20_000);
