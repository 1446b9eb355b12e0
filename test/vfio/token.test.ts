import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { readFileSync, statSync } from "node:fs";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { SystemError, VhostdError } from "../../src/base/errors.ts";
import { BareFunction } from "../kit/machine/bare-function.ts";
import { Machine } from "../kit/machine/inside.ts";
import { MachineLab } from "../kit/machine/lab.ts";
import { NetGuest } from "../kit/net/net-guest.ts";
import { rejection } from "../kit/rejection.ts";

/** The secret that a PF and its VFs are opened with, as the kernel holds us to it, one step after the other. */

const { sriov } = Machine.here().description;
const SKIP = sriov ? "" : " [skip: this QEMU emulates no SR-IOV]";
const TIMEOUT = 180_000;
const CONFIGURED = "8d2c5b1e-6f0a-4b43-9c55-1f6f3f0e7a11";
const WRONG = "00000000-0000-4000-8000-000000000000";
const EACCES = 13;
const EINVAL = 22;

describe.skipIf(!sriov)(`the vf-token${SKIP}`, () => {
  let lab: MachineLab;
  let pf: string;
  let vf: string;
  let other: string;
  let plain: string;

  beforeAll(async () => {
    lab = await MachineLab.create();
    [vf = "", other = ""] = await lab.makeVfs("pf0", 2);
    pf = lab.machine.function("pf0").address;
    [plain] = lab.bind("blk0");
  }, TIMEOUT);
  afterAll(async () => {
    await lab?.[Symbol.asyncDispose]();
  }, TIMEOUT);

  const tokenFile = () => join(lab.directory, "state/vf-token");
  const generated = () => readFileSync(tokenFile(), "utf8").trim();
  const addPf = () => lab.call("pf.add", { device: pf });
  const removePf = () => lab.call("pf.remove", { device: pf });

  async function restartDaemon(...options: readonly string[]): Promise<void> {
    await lab.stopDaemon();
    await lab.startDaemon(...options);
  }

  /** A guest runs on the VF. */
  async function serves(address: string): Promise<void> {
    {
      using _guest = await NetGuest.boot(lab.dialNet(address));
      await lab.reaches(address, "running");
    }
    await lab.reaches(address, "idle");
  }

  /** The kernel's errno for somebody who opens a function by himself. */
  async function refusal(address: string, token?: string): Promise<number> {
    const error = await rejection(BareFunction.open(address, token));
    if (!(error instanceof SystemError)) throw error;
    return error.errno;
  }

  /** What the daemon says, and what it says is to be done. */
  async function complaint(action: Promise<unknown>): Promise<{ readonly message: string; readonly fix: string }> {
    const error = await rejection(action);
    if (!(error instanceof VhostdError)) throw error;
    return { message: error.message, fix: error.fix ?? "" };
  }

  test(
    "no VF can be opened before its PF was opened with a token: the error says so",
    async () => {
      const { message, fix } = await complaint(lab.add(vf));
      expect(message).toContain("vf-token");
      expect(message).toContain(vf);
      expect(message).toContain(pf);
      expect(fix).not.toBe("");
    },
    TIMEOUT,
  );

  test(
    "a token is made once, for its owner alone, and a VF works with it",
    async () => {
      await addPf();
      expect(statSync(tokenFile()).mode & 0o777).toBe(0o600);
      await lab.add(vf, { ofPf: true });
      await serves(vf);
      await lab.remove(vf);
    },
    TIMEOUT,
  );

  test(
    "while the daemon holds the PF, a VF is opened with its token alone",
    async () => {
      expect(await refusal(vf)).toBe(EACCES);
      expect(await refusal(vf, WRONG)).toBe(EACCES);
      await using _opened = await BareFunction.open(vf, generated());
    },
    TIMEOUT,
  );

  test(
    "the token is the same after a restart, which the kernel asks for while a VF is open",
    async () => {
      const before = generated();
      await using _held = await BareFunction.open(other, before);
      await lab.killDaemon();
      await lab.startDaemon();
      await addPf();
      expect(generated()).toBe(before);
      await lab.add(vf, { ofPf: true });
      await serves(vf);
      await lab.remove(vf);
      await removePf();
    },
    TIMEOUT,
  );

  test(
    "another token than that of a VF which is open is refused for the PF, and for its VFs",
    async () => {
      const config = join(lab.directory, "other-token.toml");
      await writeFile(config, `vf-token = "${CONFIGURED}"\n`);
      const held = await BareFunction.open(other, generated());
      try {
        await restartDaemon("--config", config);
        const ofPf = await complaint(addPf());
        expect(ofPf.message).toContain(pf);
        expect(ofPf.message).toContain("vf-token");
        expect(ofPf.fix).not.toBe("");
        const ofVf = await complaint(lab.add(vf));
        expect(ofVf.message).toContain(vf);
        expect(ofVf.message).toContain("vf-token");
        expect(ofVf.fix).not.toBe("");
        // What is refused is not told to everybody.
        for (const said of [ofPf.message, ofPf.fix, ofVf.message, ofVf.fix]) {
          expect(said).not.toContain(CONFIGURED);
          expect(said).not.toContain(generated());
        }
      } finally {
        await held[Symbol.asyncDispose]();
      }
    },
    TIMEOUT,
  );

  test(
    "once nobody has a VF open, a configured token takes the place of the old one",
    async () => {
      await addPf();
      await lab.add(vf, { ofPf: true });
      await serves(vf);
      await lab.remove(vf);
      expect(await refusal(vf, generated())).toBe(EACCES);
      await using _opened = await BareFunction.open(vf, CONFIGURED);
    },
    TIMEOUT,
  );

  test(
    "a function that takes no token is given none",
    async () => {
      expect(await refusal(plain, CONFIGURED)).toBe(EINVAL);
      await lab.add(plain);
      await lab.remove(plain);
    },
    TIMEOUT,
  );
});
