import { afterAll, afterEach, beforeAll, describe, expect, test } from "bun:test";
import { ProtocolFeature } from "../../src/vhost-user/messages.ts";
import { featureBits } from "../../src/virtio/features.ts";
import { DescriptorFlag } from "../../src/virtio/split-ring.ts";
import { BlkStatus, BlkType, header, SECTOR } from "../kit/blk-requests.ts";
import type { DriverQueue } from "../kit/driver-queue.ts";
import type { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import type { FrontendMemory, MemoryRegion } from "../kit/frontend/memory.ts";
import { Machine } from "../kit/machine/inside.ts";
import { MACHINE_TEST_TIMEOUT, MachineLab } from "../kit/machine/lab.ts";
import { VerifiedDisk } from "../kit/verified-disk.ts";

/** Whose memory a function reaches: that of its VM, all of it and nothing else. */

const VM = "11111111-1111-1111-1111-111111111111";
const OTHER_VM = "22222222-2222-2222-2222-222222222222";
const MIB = 1 << 20;
/** Where a guest has its memory: some below 4 GiB, and the rings of each front-end in the last region. */
const LOW = { gpa: 0, size: 2 * MIB };
const RINGS = { gpa: 2 ** 32, size: 4 * MIB };
const MORE_RINGS = { gpa: 2 ** 32 + 64 * MIB, size: 4 * MIB };
/** A region that is plugged. */
const PLUGGED = { gpa: 2 ** 33, size: 16 * MIB };
const BLOCK = 4096;
const { write } = DescriptorFlag;

let lab: MachineLab;
let disks: readonly [string, string];

beforeAll(async () => {
  lab = await MachineLab.create();
  disks = lab.bind("blk0", "blk1");
}, MACHINE_TEST_TIMEOUT);
afterAll(async () => {
  await lab?.[Symbol.asyncDispose]();
}, MACHINE_TEST_TIMEOUT);
afterEach(async () => {
  const { vfs } = (await lab.call("vf.list")) as { readonly vfs: readonly { readonly vf: string }[] };
  for (const { vf } of vfs) await lab.remove(vf);
}, MACHINE_TEST_TIMEOUT);

/** A front-end whose back-end knows nothing of its memory yet. */
async function connect(disk: string): Promise<VhostUserFrontend> {
  const frontend = lab.dial(disk);
  await frontend.negotiate();
  return frontend;
}

/** A front-end whose disk runs. */
async function start(disk: string, regions: readonly (typeof LOW)[] = [LOW, RINGS]): Promise<VhostUserFrontend> {
  const frontend = await connect(disk);
  await frontend.setupMemory(regions);
  await frontend.startQueues(1);
  return frontend;
}

const queueOf = ({ queues }: VhostUserFrontend): DriverQueue => queues[0]!.driver;

/**
 * One request whose data is at `address`, which need not be memory that the front-end has told of.
 * @param memory where the header and the status are, in the last region
 */
async function request({ memory, queues }: VhostUserFrontend, type: number, block: number, address: number) {
  const { ring } = queues[0]!.driver;
  const place = ring.arena.take(BLOCK);
  memory.write(place, header(type, (block * BLOCK) / SECTOR));
  const data = { address, length: BLOCK, flags: type === BlkType.in ? write : 0 };
  const head = { address: place, length: 16, flags: 0 };
  await queues[0]!.driver.requestRaw([head, data, { address: place + 16, length: 1, flags: write }]);
  const [status] = memory.read(place + 16, 1);
  ring.arena.give(place);
  if (status !== BlkStatus.ok) throw new Error(`status ${status}`);
}

const noise = () => crypto.getRandomValues(new Uint8Array(BLOCK));

/** Writes a block from memory at one address and reads it back to another, through the disk. */
async function roundTrip(frontend: VhostUserFrontend, memory: FrontendMemory, from: number, to: number): Promise<void> {
  const data = noise();
  memory.write(from, data);
  memory.write(to, new Uint8Array(BLOCK));
  await request(frontend, BlkType.out, 1000, from);
  await request(frontend, BlkType.in, 1000, to);
  expect(Buffer.compare(memory.read(to, BLOCK), data)).toBe(0);
}

describe("two VFs", () => {
  test(
    "of one VM share one domain: one reaches what only the other's front-end has told of",
    async () => {
      for (const disk of disks) await lab.add(disk, { vm: VM });
      using first = await start(disks[0]);
      using second = await connect(disks[1]);
      second.memory.share(first.memory.regions[0]!);
      await second.setupMemory([MORE_RINGS]);
      await second.startQueues(1);
      const end = MORE_RINGS.gpa + MORE_RINGS.size;
      await roundTrip(first, second.memory, end - BLOCK, end - 2 * BLOCK);
      // And what both have told of stays, when one of them is gone.
      first[Symbol.dispose]();
      await lab.reaches(disks[0], "idle");
      await roundTrip(second, second.memory, LOW.gpa, LOW.gpa + LOW.size - BLOCK);
      expect(lab.takeFaults()).toEqual([]);
    },
    MACHINE_TEST_TIMEOUT,
  );

  test(
    "of two VMs have each its own memory at the same address",
    async () => {
      await lab.add(disks[0], { vm: VM });
      await lab.add(disks[1], { vm: OTHER_VM });
      using first = await start(disks[0]);
      using second = await start(disks[1]);
      for (const frontend of [first, second]) frontend.memory.write(LOW.gpa, noise());
      const before = [first, second].map(({ memory }) => memory.read(LOW.gpa, BLOCK));
      for (const frontend of [first, second]) await request(frontend, BlkType.out, 1, LOW.gpa);
      for (const frontend of [first, second]) await request(frontend, BlkType.in, 1, LOW.gpa + BLOCK);
      for (const [index, { memory }] of [first, second].entries()) {
        expect(Buffer.compare(memory.read(LOW.gpa + BLOCK, BLOCK), before[index]!)).toBe(0);
      }
      expect(Buffer.compare(before[0]!, before[1]!)).not.toBe(0);
      expect(lab.takeFaults()).toEqual([]);
    },
    MACHINE_TEST_TIMEOUT,
  );

  for (const [what, vms] of [
    ["of two VMs", [VM, OTHER_VM]],
    ["without a VM", [undefined, undefined]],
  ] as const) {
    test(
      `${what}: one does not reach what the other's guest has given`,
      async () => {
        for (const [index, vm] of vms.entries()) await lab.add(disks[index]!, vm === undefined ? {} : { vm });
        using first = await start(disks[0]);
        using second = await start(disks[1], [LOW, MORE_RINGS]);
        const place = MORE_RINGS.gpa + MORE_RINGS.size - BLOCK;
        const secret = noise();
        second.memory.write(place, secret);
        const io = new VerifiedDisk().runOn(queueOf(second), 4);
        const stray = request(first, BlkType.in, 0, place).catch(() => {});
        const faults = await lab.fault();
        expect(faults[0]).toMatchObject({ address: disks[0], operation: "write" });
        expect(faults.every(({ iova }) => iova >= BigInt(place) && iova < BigInt(place + BLOCK))).toBe(true);
        expect(Buffer.compare(second.memory.read(place, BLOCK), secret)).toBe(0);
        await io.progress(20);
        await io.stop();
        first[Symbol.dispose]();
        await stray;
      },
      MACHINE_TEST_TIMEOUT,
    );
  }
});

describe("memory that is plugged", () => {
  test(
    "is used at once, and taken away again, while requests run",
    async () => {
      await lab.add(disks[1], { vm: VM });
      using frontend = await start(disks[1]);
      const io = new VerifiedDisk().runOn(queueOf(frontend), 8);
      for (let round = 0; round < 4; round++) {
        const region = frontend.memory.add(PLUGGED.gpa + round * PLUGGED.size, PLUGGED.size);
        await io.progress(8);
        expect(await frontend.addRegion(region)).toBe(0n);
        const { gpa, size } = region.file;
        await roundTrip(frontend, frontend.memory, gpa, gpa + size - BLOCK);
        await io.progress(8);
        expect(await frontend.removeRegion(region)).toBe(0n);
        frontend.memory.drop(region);
        await io.progress(8);
      }
      await io.stop();
      expect(lab.takeFaults()).toEqual([]);
    },
    MACHINE_TEST_TIMEOUT,
  );

  test(
    "is not reached any more once it is taken away",
    async () => {
      await lab.add(disks[1], { vm: VM });
      using frontend = await start(disks[1]);
      const region = frontend.memory.add(PLUGGED.gpa, PLUGGED.size);
      expect(await frontend.addRegion(region)).toBe(0n);
      await roundTrip(frontend, frontend.memory, PLUGGED.gpa, PLUGGED.gpa + BLOCK);
      expect(await frontend.removeRegion(region)).toBe(0n);
      const stray = request(frontend, BlkType.out, 0, PLUGGED.gpa).catch(() => {});
      expect((await lab.fault())[0]).toMatchObject({ address: disks[1], operation: "read", iova: BigInt(PLUGGED.gpa) });
      frontend[Symbol.dispose]();
      await stray;
    },
    MACHINE_TEST_TIMEOUT,
  );
});

describe("memory that the IOMMU cannot take", () => {
  const end = 2 ** Machine.here().description.addressBits;
  const CASES = [
    [
      "in the window of message-signalled interrupts",
      { gpa: 0xfee00000, size: MIB },
      /meets \[0xfee00000, 0xfeefffff\]/,
    ],
    ["around that window", { gpa: 0xfe000000, size: 32 * MIB }, /meets \[0xfee00000, 0xfeefffff\]/],
    ["behind the last address", { gpa: end, size: 2 * MIB }, new RegExp(`meets \\[0x${end.toString(16)}, `)],
    ["across the last address", { gpa: end - MIB, size: 2 * MIB }, new RegExp(`meets \\[0x${end.toString(16)}, `)],
  ] as const;
  for (const [where, { gpa, size }, said] of CASES) {
    test(
      `${where}: plugged, it is refused by name, and the VF goes on`,
      async () => {
        await lab.add(disks[1], { vm: VM });
        using frontend = await start(disks[1]);
        const io = new VerifiedDisk().runOn(queueOf(frontend), 4);
        const region: MemoryRegion = frontend.memory.add(gpa, size);
        expect(await frontend.addRegion(region)).not.toBe(0n);
        await lab.daemon.line(said, 30_000);
        frontend.memory.drop(region);
        await io.progress(20);
        await io.stop();
      },
      MACHINE_TEST_TIMEOUT,
    );
  }

  test(
    "a front-end that cannot be told is turned away with that reason",
    async () => {
      await lab.add(disks[1], { vm: VM });
      {
        using frontend = lab.dial(disks[1]);
        await frontend.negotiate({ protocolFeatures: ~featureBits(ProtocolFeature.REPLY_ACK) });
        await frontend.setupMemory([LOW, { gpa: 0xfee00000, size: MIB }]);
        await frontend.hungUp();
      }
      expect((await lab.reaches(disks[1], "idle")).reason).toMatch(CASES[0][2]);
      using next = await start(disks[1]);
      await new VerifiedDisk().steps(queueOf(next), 5);
    },
    MACHINE_TEST_TIMEOUT,
  );
});
