import { expect, test } from "bun:test";
import { VhostdError } from "../../../src/base/errors.ts";
import { ProtocolFeature } from "../../../src/vhost-user/messages.ts";
import { featureBits } from "../../../src/virtio/features.ts";
import { connect, ONE_MEGABYTE, type Pair, REGIONS, startRunning } from "./harness.ts";

/** What a session says of itself when the front-end was told that its memory is refused. */

const SMALL_IOMMU = new VhostdError("invalid", "the IOMMU ends at 2 GiB", { fix: "give the guest less memory" });

async function refuseOne({ frontend, target }: Pair): Promise<void> {
  const { before } = target;
  target.before = (operation) => {
    if (operation === "map") throw SMALL_IOMMU;
  };
  expect(await frontend.addRegion(frontend.memory.add(0x80_0000_0000, ONE_MEGABYTE))).toBe(1n);
  target.before = before;
}

test("a front-end that hangs up after it was refused its memory has ended for that reason", async () => {
  await using pair = connect();
  const { frontend, session } = pair;
  await frontend.negotiate();
  await refuseOne(pair);
  const refused = session.refusedMemory;
  expect(refused?.message).toContain("0x8000000000+0x100000 cannot be mapped: the IOMMU ends at 2 GiB");
  expect(refused).toMatchObject({ fix: "give the guest less memory" });
  frontend[Symbol.dispose]();
  expect((await pair.ended).error).toBe(refused!);
});

test("SET_MEM_TABLE, and a hang-up in the middle of a message", async () => {
  await using pair = connect();
  const { frontend, target } = pair;
  await frontend.negotiate({ protocolFeatures: featureBits(ProtocolFeature.REPLY_ACK) });
  target.before = (operation) => {
    if (operation === "map") throw SMALL_IOMMU;
  };
  for (const { gpa, size } of REGIONS) frontend.memory.add(gpa, size);
  expect(await frontend.setMemTable()).toBe(1n);
  await frontend.channel.sendRaw(new Uint8Array(5));
  frontend[Symbol.dispose]();
  expect((await pair.ended).error).toMatchObject({ message: expect.stringContaining("the IOMMU ends at 2 GiB") });
});

test("what was refused before the function ran, or while it runs, is no reason any more", async () => {
  for (const when of ["before", "while"]) {
    await using pair = connect();
    const { frontend } = pair;
    if (when === "before") {
      await frontend.negotiate();
      await refuseOne(pair);
      frontend.memory.drop(frontend.memory.regions[0]!);
    }
    await startRunning(frontend, 1);
    if (when === "while") await refuseOne(pair);
    expect(pair.session.refusedMemory).toBeUndefined();
    await frontend.stop({ order: "new" });
    frontend[Symbol.dispose]();
    expect(await pair.ended).toEqual({ reason: "the front-end closed the connection" });
  }
});

test("a refusal that setting up can do without is none", async () => {
  await using pair = connect();
  const { frontend } = pair;
  await frontend.negotiate();
  expect(await frontend.setConfig(8, Uint8Array.of(1, 2, 3, 4, 5))).toBe(1n);
  frontend[Symbol.dispose]();
  expect((await pair.ended).error).toBeUndefined();
});
