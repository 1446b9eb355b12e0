import { readFileSync } from "node:fs";
import { Deadline } from "../../../src/base/deadline.ts";
import { functionDevice } from "./command-line.ts";
import {
  DESCRIPTION_VARIABLE,
  type FunctionDescription,
  type FunctionKind,
  type MachineDescription,
} from "./description.ts";
import { KernelLog } from "./kernel-log.ts";
import { findFunction, type MachineFunction } from "./pci-function.ts";
import { executeQmp } from "./qmp-port.ts";

/** Milliseconds for what the kernel does to a function (making VFs, removing it), on a busy machine. */
const FUNCTION_TIMEOUT = 120_000;

/** The machine that a test of the vfio tier runs in, as seen from inside. */
export class Machine {
  private constructor(readonly description: MachineDescription) {}

  /** Whether this process is in a machine. */
  static get present(): boolean {
    return process.env[DESCRIPTION_VARIABLE] !== undefined;
  }

  /** @throws Error outside of one */
  static here(): Machine {
    const path = process.env[DESCRIPTION_VARIABLE];
    if (path === undefined) throw new Error("this runs in a VM only: ./dev test vfio, or ./dev machine -- COMMAND");
    return new Machine(JSON.parse(readFileSync(path, "utf8")) as MachineDescription);
  }

  /** The functions of a kind, in the order of the description. VFs are in none: they are made (`enableVfs`). */
  functions(kind: FunctionKind): MachineFunction[] {
    return this.description.functions.filter((one) => one.kind === kind).map((one) => existingFunction(one));
  }

  /** The function that QEMU knows by this name, such as "blk0". @throws Error where there is none */
  function(id: string): MachineFunction {
    const found = this.description.functions.find((one) => one.id === id);
    if (found === undefined) throw new Error(`this machine has no function ${id}: ${this.ids.join(", ")}`);
    return existingFunction(found);
  }

  /** Starts the VFs of an SR-IOV function; dispose takes them away, for which nobody may use them any more. */
  async enableVfs(pf: MachineFunction, count: number): Promise<Disposable> {
    const timeout = Deadline.after(FUNCTION_TIMEOUT, `${count} VFs of ${pf.id}`);
    pf.writeAttribute("sriov_numvfs", `${count}`);
    await timeout.poll(() => pf.vfs.length === count || undefined, 10);
    return { [Symbol.dispose]: () => pf.writeAttribute("sriov_numvfs", "0") };
  }

  /** What the kernel logs from now on. */
  kernelLog(): KernelLog {
    return new KernelLog();
  }

  /**
   * A command for QEMU itself, such as device_del, device_add or human-monitor-command.
   * @returns what it answers
   * @throws Error with QEMU's reason, VhostdError timedOut
   */
  qmp(command: string, parameters: Readonly<Record<string, unknown>> = {}): Promise<unknown> {
    return executeQmp(command, parameters);
  }

  /** Unplugs a function as its hot-plug button would: the kernel waits five seconds, then asks its driver for it. */
  async unplug(one: MachineFunction): Promise<void> {
    await this.qmp("device_del", { id: one.id });
    const gone = async () => !(await this.plugged()).includes(one.id) || undefined;
    await Deadline.after(FUNCTION_TIMEOUT, `unplugging of ${one.id}`).poll(gone, 50);
  }

  /** Plugs a function in again; resolves when a driver has taken it. @returns it, with the address that it has now */
  async plug({ id, description }: MachineFunction): Promise<MachineFunction> {
    await this.qmp("device_add", functionDevice(description));
    return Deadline.after(FUNCTION_TIMEOUT, `plugging of ${id}`).poll(() => {
      const found = findFunction(description);
      // It can be seen before the kernel looks for a driver, and a binding of ours would come in between.
      return found?.driver === undefined ? undefined : found;
    }, 50);
  }

  /**
   * Reports an error of PCIe's advanced error reporting on a function, as its hardware would.
   * @param error as QEMU's pcie_aer_inject_error names it: "MALF_TLP" is fatal, "COMP_ABORT" is not; a newer QEMU masks
   *   "INTN", of which nobody hears then. Functions of the kinds "blk" and "net" can report errors
   */
  async injectError(one: MachineFunction, error: string): Promise<void> {
    const answer = await this.qmp("human-monitor-command", {
      "command-line": `pcie_aer_inject_error ${one.id} ${error}`,
    });
    // It answers errors as text, too.
    if (!/^OK/.test(`${answer}`)) throw new Error(`${error} on ${one.id}: ${answer}`);
  }

  /** QEMU's names of what is plugged in and has a name. */
  private async plugged(): Promise<string[]> {
    const devices = (await this.qmp("qom-list", { path: "/machine/peripheral" })) as { readonly name: string }[];
    return devices.map(({ name }) => name);
  }

  private get ids(): string[] {
    return this.description.functions.map(({ id }) => id);
  }
}

function existingFunction(description: FunctionDescription): MachineFunction {
  const found = findFunction(description);
  if (found === undefined) throw new Error(`${description.id} is not plugged: nothing is behind ${description.port}`);
  return found;
}
