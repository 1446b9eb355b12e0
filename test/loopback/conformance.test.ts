import { afterAll, describe, expect, test } from "bun:test";
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { blkResult, readRequest, SECTOR } from "../kit/blk-requests.ts";
import { CHECKS, type ConformanceSubject, load } from "../kit/conformance/index.ts";
import { testDeviceClass } from "../kit/index.ts";
import { rejection } from "../kit/rejection.ts";

/** The classes of this project, held against the suite that every class can be held against. */

const ROOT = join(import.meta.dir, "../..");
const directory = mkdtempSync(join(tmpdir(), "conformance-"));
afterAll(() => rmSync(directory, { recursive: true }));

const disk = join(directory, "disk.img");
writeFileSync(disk, "");
truncateSync(disk, 16 << 20);

testDeviceClass({
  plugin: join(ROOT, "plugins/blk/index.ts"),
  softvf: ["--disk", disk, "--queues", "4"],
  async exercise({ queues }) {
    for (const { driver, index } of queues) {
      const { readable, writable } = readRequest(index, SECTOR);
      const { status } = blkResult(await driver.request(readable, writable));
      if (status !== 0) throw new Error(`queue ${index} answers a read with status ${status}`);
    }
  },
});

/** VIRTIO 1.2, 5.1.6: without offloads all of it is 0. */
const NET_HEADER = new Uint8Array(12);
/** A broadcast, which every receiver takes. */
const FRAME = new Uint8Array(60).fill(0xff, 0, 6).fill(0x5a, 14);

testDeviceClass({
  plugin: join(ROOT, "plugins/net/index.ts"),
  softvf: ["--backend", "echo", "--queues", "2"],
  added: [21],
  hidden: [2, 17, 18, 19, 20, 23, 50, 52, 53, 57, 60, 62],
  async exercise({ queues }) {
    for (let pair = 0; 2 * pair < queues.length; pair++) {
      const received = queues[2 * pair]!.driver.request([], [NET_HEADER.length + FRAME.length]);
      await queues[2 * pair + 1]!.driver.request([NET_HEADER, FRAME], []);
      const { length, written } = await received;
      const frame = Buffer.concat(written).subarray(NET_HEADER.length, length);
      // The addresses are exchanged.
      if (!frame.subarray(12).equals(FRAME.subarray(12))) throw new Error(`pair ${pair} gives ${frame.toHex()} back`);
    }
  },
});

describe("a broken class between vfe-softvf, daemon and front-end", () => {
  /** The entropy device of examples/, with other members. @param parts source of its members, `good` is the class */
  function variant(name: string, parts: string): ConformanceSubject {
    const plugin = join(directory, `${name}.ts`);
    writeFileSync(
      plugin,
      `import { openSync } from "node:fs";
       import rng from "${join(ROOT, "examples/plugin-rng/index.ts")}";
       const soft = (good, broken) => ({ ...good.softDevice, create(options) {
         const device = good.softDevice.create(options);
         return Object.assign(device, broken(device));
       } });
       export default { ...rng, setup: (host) => rng.setup({
         deviceClass: (good) => host.deviceClass({ ...good, ${parts} }),
       }) };`,
    );
    return { plugin, softvf: [] };
  }

  const offered = "a front-end is offered its features and configuration, moved by vendor";
  const started = "its queues start, stop and go on, and a hang-up leaves nothing, moved by registers";
  const broken = [
    ["leaks a feature", offered, `features: { names: { 3: "LEAK" }, add: [3] }`, /the guest is offered LEAK/],
    ["says other things each time", offered, "describe: () => ({ now: crypto.randomUUID() })", /"vf -i" shows/],
    [
      "wants more queues than there are",
      offered,
      "queues: () => 3",
      /3 queues by its configuration, 1 in its registers/,
    ],
    [
      "forgets a file with each session",
      started,
      `queues: () => 1, softDevice: soft(good, () => ({ reset() { openSync("/dev/zero", "r"); return {}; } }))`,
      /vfe-softvf holds .*dev.zero/s,
    ],
    [
      "fails in the middle of a request",
      started,
      `softDevice: soft(good, () => ({ async serve() { throw new Error("out of luck"); } }))`,
      /in trouble while its queues are used: .*0000:5a:00.1/,
    ],
  ] as const;

  test.each(broken)(
    "%s",
    async (what, name, parts, says) => {
      const subject = await load({
        ...variant(what.replaceAll(" ", "-"), parts),
        exercise: async ({ queues }) => void (await queues[0]!.driver.request([], [64])),
      });
      const found = CHECKS.find((check) => check.name === name)!;
      expect((await rejection(found.run(subject))).message).toMatch(says);
    },
    60_000,
  );
});
