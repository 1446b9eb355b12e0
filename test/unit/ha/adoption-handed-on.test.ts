import { expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { VhostdError } from "../../../src/base/errors.ts";
import type { Json } from "../../../src/base/json.ts";
import { silentLogger } from "../../../src/base/log.ts";
import { Adoption, type AdoptionHost } from "../../../src/daemon/ha/adoption.ts";
import { RECORD_VERSION } from "../../../src/daemon/record.ts";
import type { LeftFunction } from "../../../src/daemon/vf-parts.ts";
import { liveFds } from "../../../src/native/fd.ts";
import { eventfd } from "../../../src/native/sys.ts";
import { MemoryKeeper } from "../../kit/memory-keeper.ts";

/** What is known of what cannot go on reaches those who attach it anew. */

const PF = "0000:5a:00.0";
const VF = "0000:5a:00.1";

test("a VF that is attached anew knows what its device has not given back, a PF of another version is renewed", async () => {
  using keeper = new MemoryKeeper();
  const rings: Json = { open: [1, 2] };
  const options = { address: VF, socket: "/tmp/vf", mode: "client" };
  const record = { version: RECORD_VERSION, options, function: null, dataPath: {}, session: null, rings, link: null };
  await keeper.put(`vf/${VF}`, () => ({ record, fds: new Map() }));
  await keeper.put(`pf/${PF}`, () => ({ record: { version: RECORD_VERSION + 1 }, fds: new Map() }));
  const seen: unknown[] = [];
  await adopt(keeper, {
    renewPfs: async (others) => void seen.push(["renewed", others]),
    attachVf: async ({ address }, left) => void seen.push([address, left]),
  });
  expect(seen).toEqual([
    ["renewed", [PF]],
    [VF, rings],
  ]);
});

test("of a VF that fails while it is taken up no fd stays open", async () => {
  const before = liveFds();
  {
    using keeper = new MemoryKeeper();
    const options = { address: VF, socket: "/tmp/vf", mode: "client" };
    const record = { version: RECORD_VERSION, options, function: {}, dataPath: {}, session: null, rings: {}, link: {} };
    {
      using fd = eventfd();
      await keeper.put(`vf/${VF}`, () => ({ record, fds: new Map([["function:socket", fd.number]]) }));
    }
    const failed: unknown[] = [];
    await adopt(keeper, { leaveVf: (_, reason) => void failed.push(reason) });
    expect(failed.at(-1)).toMatch(/does not fit/);
  }
  expect(liveFds()).toBe(before);
});

async function adopt(keeper: MemoryKeeper, members: Partial<AdoptionHost>): Promise<void> {
  const unfit = async () => {
    throw new VhostdError("invalid", "it does not fit");
  };
  const adoption = new Adoption({
    ...{ keeper, log: silentLogger },
    policy: { sideBySide: 1, next: () => 0, fallback: (trouble) => (trouble === "not open" ? "attach" : "fail") },
    revivePf: unfit,
    reviveDomain() {},
    async takeUpDomains() {},
    openVf: async () => ({ async abandon() {} }) as LeftFunction,
    reviveVf: unfit,
    async pruneDomains() {},
    async renewPfs() {},
    async attachVf() {},
    leaveVf() {},
    ...members,
  });
  await adoption.collect(Deadline.after(5_000, "the test"));
  await adoption.run();
}
