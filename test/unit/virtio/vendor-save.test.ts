import { describe, expect, test } from "bun:test";
import { TRANSFER_MAX } from "../../../src/virtio/admin/admin-memory.ts";
import { encodeState, type VendorState } from "../../../src/virtio/admin/state-blob.ts";
import { TRANSFER_DATA } from "../../../src/virtio/admin/vendor.ts";
import type { FakeAdmin, FakeAdminOptions, FakeAnswer, FakeCommand } from "../../kit/fake-admin.ts";
import { rejection } from "../../kit/rejection.ts";
import { cleanUpAfterEach, open, soon, until } from "./admin-lab.ts";

cleanUpAfterEach();

const PAGE = 4096;
const names = (commands: readonly FakeCommand[]) => commands.map(({ name }) => name);
/** What was asked of a state, in order: `[offset, length]`. */
const transfers = (fake: FakeAdmin) =>
  fake.commands("save").map(({ data }) => {
    const { offset, length } = TRANSFER_DATA.read(data);
    return [Number(offset), Number(length)];
  });

/** One whose blob has exactly this many bytes, whole pages, each of which is told from the others. */
function stateOf(size: number, mark = 1): VendorState {
  const common = {
    ...{ deviceFeatureSelect: 0, deviceFeatures: 0n, driverFeatureSelect: 0, driverFeatures: 1n << 32n },
    ...{ configVector: 0, numQueues: 2, queueSelect: 0, status: 0x0f, configGeneration: 0 },
  };
  const state = { common, config: new Uint8Array(0), queues: [], indices: [], inFlight: [], completed: [] };
  const bytes = Uint8Array.from({ length: size - 100 }, (_, i) => (mark + i + (i >> 8)) & 0xff);
  const whole = { ...state, others: [{ type: 77, bytes }] };
  expect(encodeState(whole).length).toBe(size);
  return whole;
}

/** A VF that was saved once with a state of `size` bytes. */
async function savedOnce(size: number, options: FakeAdminOptions = {}) {
  const { fake, admin } = await open(options);
  const vf = fake.vfs[0]!;
  vf.state = stateOf(size);
  fake.seen.length = 0;
  expect(await admin.save(1, soon())).toEqual(vf.state);
  const first = names(fake.seen);
  fake.seen.length = 0;
  return { fake, admin, vf, first };
}

describe("the second save of a VF", () => {
  test("asks for size and state side by side", async () => {
    const { fake, admin, vf, first } = await savedOnce(PAGE);
    expect(first).toEqual(["pendingBytes", "save"]);
    vf.state = stateOf(PAGE, 50);
    const held: (() => void)[] = [];
    fake.answer = (command) => new Promise<FakeAnswer>((resolve) => held.push(() => resolve(fake.honest(command))));
    const saved = admin.save(1, soon());
    await until(() => held.length === 2);
    expect(names(fake.seen)).toEqual(["pendingBytes", "save"]);
    // In whatever order it answers.
    for (const release of held.splice(0).reverse()) release();
    expect(await saved).toEqual(vf.state);
    expect(fake.seen.length).toBe(2);
  });

  test("of another VF is its first", async () => {
    const { fake, admin } = await savedOnce(PAGE);
    fake.vfs[1]!.state = stateOf(2 * PAGE);
    const asked: string[] = [];
    fake.answer = async (command) => {
      await Bun.sleep(1);
      asked.push(`${command.name} ${fake.seen.length}`);
      return fake.honest(command);
    };
    expect(await admin.save(2, soon())).toEqual(fake.vfs[1]!.state);
    expect(asked).toEqual(["pendingBytes 1", "save 2"]);
  });

  test("works where the queue has room for one command only", async () => {
    const { fake, admin, vf } = await savedOnce(PAGE, { queueSize: 8 });
    vf.state = stateOf(PAGE, 50);
    expect(await admin.save(1, soon())).toEqual(vf.state);
    expect(names(fake.seen)).toEqual(["pendingBytes", "save"]);
  });
});

describe("a state is read whole", () => {
  const cases: [what: string, before: number, after: number, transfers: [number, number][]][] = [
    [
      "that has grown",
      PAGE,
      3 * PAGE,
      [
        [0, PAGE],
        [PAGE, 2 * PAGE],
      ],
    ],
    ["that has shrunk", 3 * PAGE, PAGE, [[0, 3 * PAGE]]],
    [
      "that has grown beyond one transfer",
      PAGE,
      TRANSFER_MAX + 2 * PAGE,
      [
        [0, PAGE],
        [PAGE, TRANSFER_MAX],
        [PAGE + TRANSFER_MAX, PAGE],
      ],
    ],
    [
      "of several transfers, as long as before",
      2 * TRANSFER_MAX + PAGE,
      2 * TRANSFER_MAX + PAGE,
      [
        [0, TRANSFER_MAX],
        [TRANSFER_MAX, TRANSFER_MAX],
        [2 * TRANSFER_MAX, PAGE],
      ],
    ],
    ["that has shrunk from several transfers to less than one", 2 * TRANSFER_MAX + PAGE, PAGE, [[0, TRANSFER_MAX]]],
    ["of one transfer exactly", TRANSFER_MAX, TRANSFER_MAX, [[0, TRANSFER_MAX]]],
  ];
  for (const [what, before, after, expected] of cases) {
    test(what, async () => {
      const { fake, admin, vf } = await savedOnce(before);
      vf.state = stateOf(after, 50);
      expect(await admin.save(1, soon())).toEqual(vf.state);
      expect(transfers(fake)).toEqual(expected);
      // The size is that of the last one.
      fake.seen.length = 0;
      vf.state = stateOf(after, 90);
      expect(await admin.save(1, soon())).toEqual(vf.state);
      expect(transfers(fake)[0]).toEqual([0, Math.min(after, TRANSFER_MAX)]);
      expect(fake.seen.length).toBe(1 + Math.ceil(after / TRANSFER_MAX));
    });
  }

  // As a device does that refuses what goes beyond its state, or that is asked for its size first.
  for (const [what, status] of [
    ["for good", 0x84],
    ["for now", 0x05],
  ] as const) {
    test(`where the early read is refused ${what}, which is not tried again`, async () => {
      const { fake, admin, vf } = await savedOnce(3 * PAGE);
      vf.state = stateOf(PAGE, 50);
      let refusals = 0;
      fake.answer = (command) => {
        const { offset, length } = TRANSFER_DATA.read(command.data.length < TRANSFER_DATA.size ? none : command.data);
        const isBeyond = command.name === "save" && Number(offset + length) > PAGE;
        if (isBeyond) refusals++;
        return isBeyond ? { status } : fake.honest(command);
      };
      expect(await admin.save(1, soon())).toEqual(vf.state);
      expect(refusals).toBe(1);
      expect(transfers(fake)).toEqual([
        [0, 3 * PAGE],
        [0, PAGE],
      ]);
    });
  }
});

describe("a save fails", () => {
  test("where the size is refused, whatever was read early", async () => {
    const { fake, admin } = await savedOnce(PAGE);
    fake.answer = (command) => (command.name === "pendingBytes" ? { status: 0x85 } : fake.honest(command));
    const failed = await rejection(admin.save(1, soon()));
    expect(failed).toMatchObject({ code: "stateSave", message: expect.stringMatching(/pendingBytes/) });
  });

  test("where the early read is not answered", async () => {
    const { fake, admin } = await savedOnce(PAGE);
    fake.answer = (command) => (command.name === "save" ? "silence" : fake.honest(command));
    const failed = await rejection(admin.save(1, soon(100)));
    expect(failed).toMatchObject({ code: "stateSave", message: expect.stringMatching(/did not answer save/) });
  });

  test("where a read that is not early is refused", async () => {
    const { fake, admin, vf } = await savedOnce(PAGE);
    vf.state = stateOf(2 * PAGE);
    fake.answer = (command) => (transfers(fake).length === 2 ? { status: 0x84 } : fake.honest(command));
    expect(await rejection(admin.save(1, soon()))).toMatchObject({ code: "stateSave" });
  });
});

const none = new Uint8Array(TRANSFER_DATA.size);
