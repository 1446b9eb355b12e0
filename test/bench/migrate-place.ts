import type { Static } from "typebox";
import type { FunctionInfo } from "../../src/softvf/control.ts";
import { InstalledMachine } from "./installed.ts";

/** VFs of one VM share a DMA domain. */
const UUID = "0f2c5a4e-8a55-4d51-9f0c-5b1d3c2a7e10";

/** A place that a VM can be at: a daemon with managed VFs, and how long their PF's commands have taken. */
export class Place implements AsyncDisposable {
  private constructor(
    private readonly machine: InstalledMachine,
    readonly sockets: readonly string[],
  ) {}

  static async start(vfs: number, frontend: "standard" | "nvidia-presetup"): Promise<Place> {
    const machine = await InstalledMachine.start(vfs);
    const indices = Array.from({ length: vfs }, (_, vf) => vf);
    try {
      for (const vf of indices) await machine.addVf(vf, "server", { uuid: UUID, frontend });
    } catch (error) {
      await machine[Symbol.asyncDispose]();
      throw error;
    }
    return new Place(
      machine,
      indices.map((vf) => machine.socket(vf)),
    );
  }

  /** For files. It goes with the place. */
  get directory(): string {
    return this.machine.directory;
  }

  /** Admin commands take so long from now on, at least. Milliseconds. */
  async setDelay(delay: number): Promise<void> {
    await this.machine.setPf({ "admin-delay": `${delay}` });
  }

  /** In which at least one admin command was under way, since the PF was made. Milliseconds. */
  async commandTime(): Promise<number> {
    const functions = (await this.machine.callSoftvf("list", {})) as Static<typeof FunctionInfo>[];
    const admin = functions.find(({ pf }) => pf === undefined)?.admin;
    if (admin === undefined) throw new Error("the software PF has no admin queue");
    return admin.busyMicroseconds / 1000;
  }

  /** Waits until nothing of an earlier front-end is left. */
  async idle(): Promise<void> {
    for (const vf of this.sockets.keys()) await this.machine.idle(vf);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.machine[Symbol.asyncDispose]();
  }
}
