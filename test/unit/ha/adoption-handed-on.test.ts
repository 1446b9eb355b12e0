import { expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { VhostdError } from "../../../src/base/errors.ts";
import type { Json } from "../../../src/base/json.ts";
import { silentLogger } from "../../../src/base/log.ts";
import { Adoption, type AdoptionHost } from "../../../src/daemon/ha/adoption.ts";
import { Attempts } from "../../../src/daemon/ha/attempts.ts";
import { NO_RINGS } from "../../../src/daemon/open-rings.ts";
import { hollowRecord, RECORD_VERSION } from "../../../src/daemon/record.ts";
import type { LeftFunction } from "../../../src/daemon/vf-parts.ts";
import { liveFds } from "../../../src/native/fd.ts";
import { eventfd } from "../../../src/native/sys.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
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
    await adopt(keeper, { leaveVf: (left) => void failed.push(left.failed) });
    expect(failed.at(-1)).toMatch(/does not fit/);
  }
  expect(liveFds()).toBe(before);
});

test("of what processes before died of no fd stays open", async () => {
  const before = liveFds();
  {
    using keeper = new MemoryKeeper();
    const options = { address: parsePciAddress(VF), socket: "/tmp/vf", mode: "client" } as const;
    await keeper.put(`vf/${VF}`, () => ({ record: hollowRecord(options, NO_RINGS), fds: new Map() }));
    {
      using attempts = await Attempts.open(keeper, [`vf/${VF}`], silentLogger);
      void attempts.during("take up", `vf/${VF}`, () => new Promise(() => {}));
    }
    const seen: unknown[] = [];
    await adopt(keeper, { attachVf: async ({ address }) => void seen.push(address) });
    expect(seen).toEqual([VF]);
    expect(keeper.keys).toEqual([`vf/${VF}`]);
  }
  expect(liveFds()).toBe(before);
});

test("a process that ends in order attaches none anew any more, and who comes next knows what others died of", async () => {
  using keeper = new MemoryKeeper();
  const options = { address: parsePciAddress(VF), socket: "/tmp/vf", mode: "client" } as const;
  await keeper.put(`vf/${VF}`, () => ({ record: hollowRecord(options, NO_RINGS), fds: new Map() }));
  const attached: unknown[] = [];
  const adoption = adoptionOf(keeper, {
    renewPfs: () => adoption.leave(Deadline.after(5_000, "the test")),
    attachVf: async ({ address }) => void attached.push(address),
  });
  await adoption.collect(Deadline.after(5_000, "the test"));
  await adoption.run();
  expect(attached).toEqual([]);
  expect(keeper.keys).toEqual(["adoption", `vf/${VF}`]);
});

function adoptionOf(keeper: MemoryKeeper, members: Partial<AdoptionHost>): Adoption {
  const unfit = async () => {
    throw new VhostdError("invalid", "it does not fit");
  };
  return new Adoption({
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
}

async function adopt(keeper: MemoryKeeper, members: Partial<AdoptionHost>): Promise<void> {
  const adoption = adoptionOf(keeper, members);
  await adoption.collect(Deadline.after(5_000, "the test"));
  await adoption.run();
}
