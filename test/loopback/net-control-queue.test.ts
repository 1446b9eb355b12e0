import { describe, expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import { VhostdError } from "../../src/base/errors.ts";
import { hasFeature } from "../../src/virtio/features.ts";
import { MOVERS } from "../kit/movers.ts";
import { encodeFrame } from "../kit/net/frames.ts";
import { NetFeature } from "../kit/net/net-frontend.ts";
import { NetLab } from "../kit/net/net-lab.ts";
import { COMPLETE } from "../kit/net/streams.ts";
import { RegistryLab } from "../kit/registry-lab.ts";
import { rejection } from "../kit/rejection.ts";

/** The control queue that a VF has for itself, and VFs that have none. */

const PATIENCE = 10_000;
const FOREIGN = [0x02, 0x77, 0, 0, 0, 0x77] as const;
const MULTICAST = [0x33, 0x33, 0, 0, 0, 1] as const;

describe.each(MOVERS)("moved by $mover", ({ mover, migration }) => {
  test("the device receives what is for any address, by every pair in use, from the first frame on", async () => {
    await using lab = await NetLab.create({ migration });
    for (const enabled of [1, 4]) {
      using here = await lab.boot(0, { pairs: 4, enabled });
      using there = await lab.boot(1, { pairs: 4 });
      for (const to of [FOREIGN, MULTICAST, here.mac]) {
        const frame = encodeFrame({ to, from: there.mac, stream: 0xffff_0000, sequence: 0, size: 60 });
        const arrived = here.sink.of(0xffff_0000);
        const before = arrived.received + arrived.duplicated;
        await Promise.all(there.pairs.map((pair) => pair.send(frame)));
        while (arrived.received + arrived.duplicated < before + 4) expect(await here.sink.next(5_000)).toBe(true);
      }
      expect([...here.sink.of(0xffff_0000).pairs].sort()).toEqual(Array.from({ length: enabled }, (_, pair) => pair));
      expect(hasFeature(here.frontend.features, NetFeature.ctrlVq)).toBe(false);
    }
    await lab.idle(0, 1);
    const [control] = (await lab.stats(0)).slice(8);
    expect(control!.bad).toBe(0);
    // Two commands at each start; a state that is restored needs none.
    if (mover === "registers") expect(control!.completed).toBeGreaterThanOrEqual(4);
    else expect(control!.completed).toBe(0);
  }, 30_000);

  test("VQ_PAIRS_SET follows the pairs in use", async () => {
    await using lab = await NetLab.create({ migration });
    using here = await lab.boot(0, { pairs: 4, enabled: 1 });
    using there = await lab.boot(1, { pairs: 4 });
    const commands = async () => (await lab.stats(0))[8]!.completed;
    for (const enabled of [2, 4, 3, 1]) {
      const before = await commands();
      await here.frontend.useOnly(enabled);
      // Of fewer pairs the device may learn a moment later.
      await Deadline.after(PATIENCE, `traffic by ${enabled} pairs`).poll(async () => {
        const streams = there.streams(here);
        await Promise.all(streams.map((stream) => stream.progress(10)));
        await Promise.all(streams.map((stream) => stream.stop()));
        const pairs = new Set(streams.flatMap(({ arrived }) => [...arrived.pairs]));
        return pairs.size === enabled || undefined;
      }, 10);
      if (mover === "registers") expect(await commands()).toBeGreaterThan(before);
    }
  }, 30_000);

  test("without a control queue there is one pair, and it is said", async () => {
    await using lab = await NetLab.create({ migration, softvf: ["--control-queue", "off"] });
    expect(Bun.inspect(lab.info(0))).toContain("1 (of 4: the VF has no control queue)");
    using here = await lab.boot(0);
    using there = await lab.boot(1);
    expect(await here.frontend.askU64(17)).toBe(1n);
    const streams = [...here.streams(there), ...there.streams(here)];
    await Promise.all(streams.map((stream) => stream.progress(50)));
    expect(await Promise.all(streams.map((stream) => stream.stop()))).toEqual([COMPLETE, COMPLETE]);
  }, 30_000);

  test("too few vectors: the number that is needed is said", async () => {
    const softvf = ["--backend", "wire", "--queues", "4", "--vectors", "3"];
    await using lab = await RegistryLab.create({ className: "net", vfs: 2, migration, softvf });
    await lab.registry.addPf(lab.pf);
    const error = await rejection(lab.serve());
    expect(error).toBeInstanceOf(VhostdError);
    expect(error).toMatchObject({ code: "noVectors", message: expect.stringContaining("10 MSI-X vectors") });
  }, 30_000);
});
