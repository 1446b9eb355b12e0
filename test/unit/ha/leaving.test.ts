import { expect, test } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { VhostdError } from "../../../src/base/errors.ts";
import { endUnkept } from "../../../src/daemon/leaving.ts";
import type { Vf } from "../../../src/daemon/vf.ts";
import { vfKey } from "../../../src/daemon/vf-parts.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import { MemoryKeeper } from "../../kit/memory-keeper.ts";

/** VFs that nobody keeps end, so that the others can be handed over. */

const MIGRATING = parsePciAddress("0000:5a:00.1");
const COMING = parsePciAddress("0000:5a:00.2");

/** Calls back while the VM of one VF is being migrated, which the keeper does not have. @returns which were removed */
async function leftFor(keeper: MemoryKeeper, meanwhile: (live: Vf[]) => Promise<void>): Promise<string[]> {
  const migrating = {
    address: MIGRATING,
    isMigrating: true,
    async leaveMigration() {
      await meanwhile(live);
      migrating.isMigrating = false;
    },
  };
  const live = [migrating as unknown as Vf];
  const removed: string[] = [];
  const remove = async (address: string) => void removed.push(address);
  await endUnkept({ keeper, live: () => live, remove }, Deadline.after(30_000, "the test"));
  return removed;
}

test("one that comes meanwhile, and is kept, is handed over", async () => {
  using keeper = new MemoryKeeper();
  const removed = await leftFor(keeper, async (live) => {
    await keeper.put(vfKey(COMING), () => ({ record: {}, fds: new Map() }));
    live.push({ address: COMING, isMigrating: false } as Vf);
  });
  expect(removed).toEqual([MIGRATING]);
});

test("none is removed where the keeper does not say any more what it has", async () => {
  using keeper = new MemoryKeeper();
  const removed = await leftFor(keeper, async () => {
    keeper.list = () => Promise.reject(new VhostdError("connectionLost", "it is away"));
  });
  expect(removed).toEqual([]);
});
