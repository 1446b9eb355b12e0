import type { Migration } from "../movers.ts";
import { RegistryLab, type RegistryLabOptions } from "../registry-lab.ts";
import type { Mac } from "./frames.ts";
import { NetFrontend, type NetFrontendOptions } from "./net-frontend.ts";
import { type BootOptions, NetGuest } from "./net-guest.ts";

export interface NetLabOptions extends Pick<RegistryLabOptions, "deadlines" | "vfs"> {
  readonly migration?: Migration;
  /** Queue pairs of each VF; 4 unless said. */
  readonly pairs?: number;
  /** Where frames go; VFs 0 and 1 are at the ends of a wire, 2 and 3, and so on, unless said. */
  readonly backend?: "wire" | "echo";
  /** Further options of vfe-softvf. */
  readonly softvf?: readonly string[];
}

/** What vfe-softvf gives the VF of this number, where nobody says otherwise. */
export function macOfVf(vf: number): Mac {
  return [0x02, 0, 0, 0, 0, vf];
}

/** Network VFs in vfe-softvf and the daemon's registry, which waits for a front-end at each of them. */
export class NetLab implements AsyncDisposable {
  private constructor(readonly daemon: RegistryLab) {}

  static async create(options: NetLabOptions = {}): Promise<NetLab> {
    const { pairs = 4, backend = "wire", softvf = [], vfs = 2, ...rest } = options;
    const own = ["--backend", backend, "--queues", `${pairs}`];
    await using undo = new AsyncDisposableStack();
    const daemon = undo.use(await RegistryLab.create({ ...rest, className: "net", vfs, softvf: [...own, ...softvf] }));
    await daemon.registry.addPf(daemon.pf);
    for (let vf = 0; vf < vfs; vf++) await daemon.serve(daemon.vfAt(vf));
    undo.move();
    return new NetLab(daemon);
  }

  /** A connection to the VF of that number. */
  dial(vf: number, options: NetFrontendOptions = {}): NetFrontend {
    const { daemon } = this;
    return NetFrontend.connect(daemon.socket(`${daemon.vfAt(vf)}.sock`), options);
  }

  /** A guest whose network runs on the VF of that number. */
  async boot(vf: number, options: NetFrontendOptions & BootOptions = {}): Promise<NetGuest> {
    const { mac, size, firstIndex, ...frontend } = options;
    const queues = { ...(size === undefined ? {} : { size }), ...(firstIndex === undefined ? {} : { firstIndex }) };
    const guest = await NetGuest.boot(this.dial(vf, frontend), { mac: mac ?? macOfVf(vf), ...queues });
    await this.daemon.running(this.daemon.vfAt(vf));
    return guest;
  }

  /** Another daemon goes on with what the keeper has; neither front-ends nor functions are told. */
  async restartDaemon(): Promise<void> {
    const { daemon } = this;
    await daemon.registry.abandon();
    daemon.registry = daemon.newRegistry();
    await daemon.registry.revive();
  }

  info(vf: number) {
    return this.daemon.registry.vfInfo(this.daemon.vfAt(vf));
  }

  stats(vf: number) {
    return this.daemon.stats(this.daemon.vfAt(vf));
  }

  async idle(...vfs: readonly number[]): Promise<void> {
    for (const vf of vfs) await this.daemon.idle(this.daemon.vfAt(vf));
  }

  async set(vf: number, options: Readonly<Record<string, string | number | boolean>>): Promise<void> {
    await this.daemon.set(this.daemon.vfAt(vf), options);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.daemon[Symbol.asyncDispose]();
  }
}
