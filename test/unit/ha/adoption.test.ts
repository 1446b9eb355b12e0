import { describe, expect, test } from "bun:test";
import haPlugin from "../../../plugins/ha/index.ts";
import { Deadline } from "../../../src/base/deadline.ts";
import { VhostdError } from "../../../src/base/errors.ts";
import type { Json } from "../../../src/base/json.ts";
import { silentLogger } from "../../../src/base/log.ts";
import { DeviceTable } from "../../../src/daemon/device-table.ts";
import { Adoption, type AdoptionHost } from "../../../src/daemon/ha/adoption.ts";
import { forgetFailed } from "../../../src/daemon/ha/failed-vf.ts";
import { RECORD_VERSION } from "../../../src/daemon/record.ts";
import type { LeftFunction } from "../../../src/daemon/vf-parts.ts";
import { liveFds } from "../../../src/native/fd.ts";
import { eventfd } from "../../../src/native/sys.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import { Bus } from "../../../src/pci/bus.ts";
import type { AdoptionPolicy } from "../../../src/plugin.ts";
import { SessionPage } from "../../../src/vhost-user/session-page.ts";
import { MemoryKeeper } from "../../kit/memory-keeper.ts";
import { rejection } from "../../kit/rejection.ts";

const soon = () => Deadline.after(5_000, "the test");
const vf = (index: number) => parsePciAddress(`0000:5a:00.${index}`);

function policyOfHa(): AdoptionPolicy {
  let found: AdoptionPolicy | undefined;
  haPlugin.setup({
    deviceClass() {},
    adoption(policy) {
      found = policy;
    },
  });
  return found!;
}

/** Records of VFs, and a host that takes each of them up when it is told to. */
class Lab implements Disposable {
  readonly keeper: MemoryKeeper;
  /** What was begun with, in that order. */
  readonly begun: string[] = [];
  readonly gates = new Map<string, PromiseWithResolvers<void>>();
  readonly left = new Map<string, string | undefined>();
  readonly attached: string[] = [];
  /** Domains and functions: what was begun with. */
  readonly opened: string[] = [];
  /** It never ends what it does with this: a process that is dead. */
  deadly: string | undefined;
  unattachable: string | undefined;
  readonly death = Promise.withResolvers<void>();
  readonly adoption: Adoption;

  /** @param before what a lab that is dead has left */
  constructor(policy: Partial<AdoptionPolicy> = {}, before?: Lab) {
    this.keeper = before?.keeper ?? new MemoryKeeper();
    const host: AdoptionHost = {
      ...{ keeper: this.keeper, log: silentLogger, policy: { ...policyOfHa(), sideBySide: 1, ...policy } },
      revivePf: async () => {
        throw new VhostdError("invalid", "it is damaged");
      },
      reviveDomain() {},
      takeUpDomains: () => this.reaches("domains"),
      openVf: async ({ options }) => {
        this.opened.push(options.address);
        await this.reaches(`open ${options.address}`);
        await Bun.sleep(0);
        return { async abandon() {} } as LeftFunction;
      },
      reviveVf: async ({ options, fds }) => {
        this.begun.push(options.address);
        await this.reaches(options.address);
        await this.gate(options.address).promise;
        for (const fd of fds.values()) fd[Symbol.dispose]();
        this.left.delete(options.address);
      },
      async pruneDomains() {},
      async renewPfs() {},
      attachVf: async ({ address }) => {
        await this.reaches(`attach ${address}`);
        if (this.unattachable === address) throw new VhostdError("busy", "somebody else has it open");
        this.attached.push(address);
        this.left.delete(address);
      },
      leaveVf: ({ options, failed }) => void this.left.set(options.address, failed),
    };
    this.adoption = new Adoption(host);
  }

  gate(address: string): PromiseWithResolvers<void> {
    const gate = this.gates.get(address) ?? Promise.withResolvers<void>();
    this.gates.set(address, gate);
    return gate;
  }

  private async reaches(event: string): Promise<void> {
    if (event !== this.deadly) return;
    this.death.resolve();
    await new Promise(() => {});
  }

  async store(
    index: number,
    more: Readonly<Record<string, Json>> = {},
    fds: ReadonlyMap<string, number> = new Map(),
  ): Promise<void> {
    const options = { address: vf(index), socket: `/tmp/vf${index}`, mode: "client" };
    const record = {
      ...{ version: RECORD_VERSION, options, function: {} },
      ...{ dataPath: {}, session: null, rings: null, link: null },
      ...more,
    };
    using fd = eventfd();
    await this.keeper.put(`vf/${vf(index)}`, () => ({
      record,
      fds: new Map([...fds, ["function:socket", fd.number]]),
    }));
  }

  /** Waits until so many are begun with. */
  async hasBegun(count: number): Promise<void> {
    await soon().poll(() => this.begun.length >= count || undefined, 1);
  }

  [Symbol.dispose](): void {
    this.keeper[Symbol.dispose]();
  }
}

describe("the order", () => {
  test("one that somebody asks for is next, and who asks waits until it is there", async () => {
    using lab = new Lab();
    for (const index of [1, 2, 3, 4]) await lab.store(index);
    await lab.adoption.collect(soon());
    expect([...lab.left]).toEqual([1, 2, 3, 4].map((index) => [vf(index), undefined]));
    const run = lab.adoption.run();
    await lab.hasBegun(1);
    let there = false;
    const hurry = lab.adoption.hurry(vf(3)).then(() => {
      there = true;
    });
    lab.gate(vf(1)).resolve();
    await lab.hasBegun(2);
    expect(lab.begun).toEqual([vf(1), vf(3)]);
    await Bun.sleep(5);
    expect(there).toBe(false);
    lab.gate(vf(3)).resolve();
    await hurry;
    for (const index of [2, 4]) lab.gate(vf(index)).resolve();
    await run;
    expect(lab.begun).toEqual([vf(1), vf(3), vf(2), vf(4)]);
    expect(lab.left.size).toBe(0);
    // There is nothing to wait for.
    await lab.adoption.hurry(vf(3));
    await lab.adoption.hurry(vf(7));
  });

  test("those whose front-ends wait come first; a keeper that cannot say is none that stops anything", async () => {
    for (const answers of [true, false]) {
      using lab = new Lab();
      for (const index of [1, 2, 3]) await lab.store(index);
      const asked: string[] = [];
      Object.assign(lab.keeper, {
        async readable(places: readonly (readonly [string, number])[]) {
          asked.push(...places.map(([key, place]) => `${key} ${place}`));
          if (!answers) throw new VhostdError("connectionLost", "the keeper is not there");
          return places.map(([key]) => key === `vf/${vf(3)}`);
        },
      });
      await lab.adoption.collect(soon());
      for (const index of [1, 2, 3]) lab.gate(vf(index)).resolve();
      await lab.adoption.run();
      expect(asked.slice(0, 3)).toEqual([1, 2, 3].map((index) => `vf/${vf(index)} 0`));
      expect(lab.begun).toEqual((answers ? [3, 1, 2] : [1, 2, 3]).map(vf));
    }
  });

  test("a policy that names none of them, or fails, stops nothing", async () => {
    const policies: Partial<AdoptionPolicy>[] = [
      { next: () => 17 },
      {
        next() {
          throw new Error("a plugin's mistake");
        },
      },
    ];
    for (const policy of policies) {
      using lab = new Lab(policy);
      for (const index of [1, 2]) await lab.store(index);
      await lab.adoption.collect(soon());
      for (const index of [1, 2]) lab.gate(vf(index)).resolve();
      await lab.adoption.run();
      expect(lab.begun).toEqual([vf(1), vf(2)]);
    }
  });
});

describe("what cannot go on", () => {
  test("each is left as its trouble wants it, the others are taken up, and no fd of it stays anywhere", async () => {
    const before = liveFds();
    {
      using lab = new Lab();
      await lab.store(1, { version: 2 });
      await lab.store(2, { function: null });
      await lab.store(3, { options: 7 });
      await lab.store(4);
      await lab.store(5, { held: "upside down" });
      await lab.keeper.put(`pf/${vf(0)}`, () => ({ record: {}, fds: new Map() }));
      await lab.keeper.put("vf/none", () => ({ record: {}, fds: new Map() }));
      lab.gate(vf(4)).resolve();
      await lab.adoption.collect(soon());
      await lab.adoption.run();
      expect(lab.begun).toEqual([vf(4)]);
      expect(lab.attached).toEqual([vf(1), vf(2)]);
      expect([...lab.left.keys()]).toEqual([vf(3), vf(5)]);
      expect(lab.left.get(vf(5))).toMatch(/held/);
      // Who comes after this process still knows of those that are attached anew, and of those that cannot be taken up.
      const kept = [1, 2, 4].map((index) => `vf/${vf(index)}`);
      expect(lab.keeper.keys.toSorted()).toEqual([...[3, 5].map((index) => `failed/${vf(index)}`), ...kept]);
      expect(await lab.keeper.get(`vf/${vf(1)}`)).toMatchObject({ record: { function: null }, fds: new Map() });
    }
    expect(liveFds()).toBe(before);
  });

  test("a record that the keeper cannot give is damaged; where the keeper is gone nothing is taken up", async () => {
    using lab = new Lab();
    for (const index of [1, 2]) await lab.store(index);
    const { get } = lab.keeper;
    let code: "protocol" | "connectionLost" = "protocol";
    lab.keeper.get = async (key) => {
      if (key.endsWith(vf(1))) throw new VhostdError(code, "the record does not fit its fds");
      return await get.call(lab.keeper, key);
    };
    lab.gate(vf(2)).resolve();
    await lab.adoption.collect(soon());
    await lab.adoption.run();
    expect(lab.begun).toEqual([vf(2)]);
    expect([...lab.left.keys()]).toEqual([vf(1)]);
    await lab.store(1);
    code = "connectionLost";
    expect(await rejection(lab.adoption.collect(soon()))).toMatchObject({ code });
  });

  test("who asks for one that is attached anew waits for that", async () => {
    using lab = new Lab();
    await lab.store(1, { version: 2 });
    await lab.store(2);
    await lab.adoption.collect(soon());
    const run = lab.adoption.run();
    const hurry = lab.adoption.hurry(vf(1));
    await lab.hasBegun(1);
    expect(lab.attached).toEqual([]);
    lab.gate(vf(2)).resolve();
    await hurry;
    expect(lab.attached).toEqual([vf(1)]);
    await run;
  });
});

/** Each process dies of it, until one does not. @returns that one, which goes on; how many died */
async function dieOf(deadly: string, first: Lab): Promise<{ lab: Lab; deaths: number }> {
  let lab = first;
  for (let deaths = 0; ; deaths++) {
    lab.deadly = deadly;
    for (const index of [1, 2, 3, 4, 5]) lab.gate(vf(index)).resolve();
    let done = false;
    const all = lab.adoption
      .collect(soon())
      .then(() => lab.adoption.run())
      .then(() => {
        done = true;
      });
    await Promise.race([all, lab.death.promise]);
    if (done) return { lab, deaths };
    lab = new Lab({ sideBySide: 2 }, lab);
  }
}

describe("a record that kills whoever takes it up", () => {
  const others = [1, 2, 4, 5].map(vf);

  test("is tried three times; the VF fails then, the others go on, also where they were begun with beside it", async () => {
    using first = new Lab({ sideBySide: 2 });
    for (const index of [1, 2, 3, 4, 5]) await first.store(index);
    const { lab, deaths } = await dieOf(vf(3), first);
    expect(deaths).toBe(3);
    expect(lab.opened.toSorted()).toEqual(others);
    expect(lab.begun.toSorted()).toEqual(others);
    expect([...lab.left.keys()]).toEqual([vf(3)]);
    expect(lab.left.get(vf(3))).toMatch(`died 3 times in a row while it took up vf/${vf(3)}; report it`);
    expect(lab.keeper.keys.toSorted()).toEqual([`failed/${vf(3)}`, ...others.map((address) => `vf/${address}`)]);
  });

  test("is taken up last, and with it nothing else; after it those whose sessions have killed", async () => {
    using first = new Lab({ sideBySide: 2 });
    for (const index of [1, 3]) await first.store(index);
    using page = SessionPage.create();
    page.noteAttempt();
    await first.store(2, {}, new Map([["session:page", page.fd]]));
    first.deadly = vf(1);
    await first.adoption.collect(soon());
    void first.adoption.run();
    await first.hasBegun(2);
    expect(first.begun).toEqual([vf(1), vf(3)]);
    const second = new Lab({ sideBySide: 2 }, first);
    await second.store(4);
    await second.adoption.collect(soon());
    const run = second.adoption.run();
    await second.hasBegun(1);
    await Bun.sleep(5);
    for (const [count, index] of [4, 1, 3, 2].entries()) {
      expect(second.begun).toEqual([4, 1, 3, 2].slice(0, count + 1).map(vf));
      second.gate(vf(index)).resolve();
      await Bun.sleep(20);
    }
    await run;
    expect(second.begun).toHaveLength(4);
  });

  test.each([
    ["when its function is opened", `open ${vf(3)}`],
    ["when it is attached anew", `attach ${vf(3)}`],
  ])("%s: the same", async (_, deadly) => {
    using first = new Lab({ sideBySide: 2 });
    for (const index of [1, 2, 4, 5]) await first.store(index);
    await first.store(3, deadly.startsWith("open") ? {} : { function: null });
    const { lab, deaths } = await dieOf(deadly, first);
    expect(deaths).toBe(3);
    expect(lab.begun.toSorted()).toEqual(others);
    expect(lab.left.get(vf(3))).toMatch("died 3 times in a row");
    expect(lab.keeper.keys).toContain(`failed/${vf(3)}`);
  });

  test("of all domains: VFs go on with what is mapped", async () => {
    using first = new Lab();
    await first.store(1);
    const { lab, deaths } = await dieOf("domains", first);
    expect(deaths).toBe(3);
    expect(lab.begun).toEqual([vf(1)]);
  });

  test("a process that ends in order while it takes one up has not died of it, and begins with no other", async () => {
    let lab = new Lab();
    using _keeper = lab;
    for (const index of [1, 2]) await lab.store(index);
    for (let round = 0; round < 4; round++) {
      lab.deadly = vf(1);
      await lab.adoption.collect(soon());
      void lab.adoption.run();
      await lab.hasBegun(1);
      await lab.adoption.leave(Deadline.after(10, "the end of what is under way"));
      expect(lab.begun).toEqual([vf(1)]);
      lab = new Lab({}, lab);
    }
    await lab.adoption.collect(soon());
    const run = lab.adoption.run();
    await lab.hasBegun(1);
    const left = lab.adoption.leave(soon());
    lab.gate(vf(1)).resolve();
    await Promise.all([left, run]);
    // What was under way has ended; the other one is for who comes next.
    expect(lab.begun).toEqual([vf(1)]);
    expect(lab.left.get(vf(2))).toBeUndefined();
    expect(lab.keeper.keys).toContain(`vf/${vf(2)}`);
  });
});

test("one that could not be attached anew has failed, and is tried again after the next restart", async () => {
  using lab = new Lab();
  await lab.store(1, { function: null });
  lab.unattachable = vf(1);
  await lab.adoption.collect(soon());
  // As an attempt that has got far leaves it.
  await lab.keeper.delete(`vf/${vf(1)}`);
  await lab.adoption.run();
  expect([...lab.left]).toEqual([[vf(1), "somebody else has it open"]]);
  const next = new Lab({}, lab);
  await next.adoption.collect(soon());
  await next.adoption.run();
  expect(next.attached).toEqual([vf(1)]);
});

test("one that has failed is shown by all who come after, until it is taken away or added again", async () => {
  using first = new Lab();
  await first.store(1, { held: "upside down" });
  let lab = first;
  for (let restart = 0; restart < 3; restart++) {
    await lab.adoption.collect(soon());
    await lab.adoption.run();
    expect([...lab.left]).toEqual([[vf(1), expect.stringMatching(/held/)]]);
    expect(lab.keeper.keys).toEqual([`failed/${vf(1)}`]);
    lab = new Lab({}, lab);
  }
  // Added again by a daemon that knew nothing of it.
  await lab.store(1);
  lab.gate(vf(1)).resolve();
  await lab.adoption.collect(soon());
  await lab.adoption.run();
  expect([...lab.left]).toEqual([]);
  expect(lab.keeper.keys).toEqual([`vf/${vf(1)}`]);
  await forgetFailed(lab.keeper, vf(1));
  expect(lab.keeper.keys).toEqual([]);
  await lab.keeper.put(`failed/${vf(1)}`, () => ({ record: { reason: 7 }, fds: new Map() }));
  lab = new Lab({}, lab);
  await lab.adoption.collect(soon());
  expect([...lab.left]).toEqual([]);
  expect(lab.keeper.keys.filter((key) => key.startsWith("failed/"))).toEqual([]);
});

test("an operation that meets one that waits, or has failed, is told so", () => {
  const table = new DeviceTable(new Bus([]));
  const options = { address: vf(1), socket: "/tmp/vf1", mode: "client" } as const;
  table.vfs.set(vf(1), { slot: { left: { options } }, socket: options.socket, pf: undefined });
  expect(() => table.liveVf(vf(1))).toThrow(
    expect.objectContaining({ code: "vfRestoring", number: 1042, fix: "try again in a moment" }),
  );
  table.vfs.set(vf(1), { slot: { left: { options, failed: "no such thing" } }, socket: options.socket, pf: undefined });
  expect(() => table.liveVf(vf(1))).toThrow(
    expect.objectContaining({
      code: "noDevice",
      message: `VF ${vf(1)} could not be taken up after a restart: no such thing`,
      fix: `remove it, then add it again: vfe-vhost-cli vf -r ${vf(1)}`,
    }),
  );
});
