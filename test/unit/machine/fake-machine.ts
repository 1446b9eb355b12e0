import { mkdir, mkdtemp, readlink, rm, symlink } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join, relative } from "node:path";
import { SystemError } from "../../../src/base/errors.ts";
import { type Effects, Machine } from "../../../src/machine/machine.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";

/** A function of a fake machine. */
interface FakeFunction {
  readonly address: string;
  readonly device?: string;
  readonly class?: string;
  readonly group?: number;
  /** The driver that takes it by itself, and has it at first. */
  readonly driver?: string;
  /** Directories below the root bus that lead to it. */
  readonly below?: string;
}

const DEVICES = "/sys/bus/pci/devices";

/** A tree like /sys and /proc in a temporary directory, and a kernel that does what is written there. */
export class FakeMachine implements Effects, AsyncDisposable {
  /** What was written and run, as a person would type it. */
  readonly log: string[] = [];
  readonly claimed = new Set<string>();
  readonly machine: Machine;
  /** Drivers that refuse whatever they are given. */
  readonly refusing = new Set<string>();
  /** errno of writes that fail, by path, or by "value > path". */
  readonly failures = new Map<string, number>();
  private readonly natural = new Map<string, string>();
  private nextGroup = 50;

  private constructor(private readonly root: string) {
    this.machine = new Machine(root, this);
  }

  static async make(): Promise<FakeMachine> {
    const fake = new FakeMachine(await mkdtemp(join(tmpdir(), "machine-")));
    await fake.driver("vfio-pci");
    await fake.files({
      "/sys/bus/pci/drivers_probe": "",
      "/sys/module/vfio_pci/parameters/enable_sriov": "N\n",
      "/proc/cpuinfo": "processor\t: 0\nvendor_id\t: GenuineIntel\n",
    });
    return fake;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await rm(this.root, { recursive: true });
  }

  async files(contents: Readonly<Record<string, string>>): Promise<void> {
    for (const [path, text] of Object.entries(contents)) {
      await mkdir(dirname(this.at(path)), { recursive: true });
      await Bun.write(this.at(path), text);
    }
  }

  /** A relative link. */
  async link(path: string, target: string): Promise<void> {
    await mkdir(dirname(this.at(path)), { recursive: true });
    await rm(this.at(path), { force: true });
    await symlink(relative(dirname(path), target), this.at(path));
  }

  /** A link that says exactly this, like those of /proc/PID/fd. */
  async exactLink(path: string, text: string): Promise<void> {
    await mkdir(dirname(this.at(path)), { recursive: true });
    await symlink(text, this.at(path));
  }

  async remove(path: string): Promise<void> {
    await rm(this.at(path), { recursive: true });
  }

  async driver(name: string): Promise<void> {
    await mkdir(this.at(`/sys/bus/pci/drivers/${name}`), { recursive: true });
  }

  /** @returns its directory, as the links of other classes resolve to it */
  async function(fn: FakeFunction): Promise<string> {
    const directory = `/sys/devices/pci0000:00${fn.below ?? ""}/${fn.address}`;
    await this.files({
      [`${directory}/vendor`]: "0x1af4\n",
      [`${directory}/device`]: `${fn.device ?? "0x1042"}\n`,
      [`${directory}/class`]: `${fn.class ?? "0x010000"}\n`,
      [`${directory}/driver_override`]: "(null)\n",
      [`${directory}/modalias`]: `pci:${fn.address}\n`,
    });
    await this.link(`${DEVICES}/${fn.address}`, directory);
    if (fn.group !== undefined) {
      await this.link(`${directory}/iommu_group`, `/sys/kernel/iommu_groups/${fn.group}`);
      await this.link(`/sys/kernel/iommu_groups/${fn.group}/devices/${fn.address}`, directory);
    }
    if (fn.driver !== undefined) {
      this.natural.set(fn.address, fn.driver);
      await this.driver(fn.driver);
      await this.link(`${directory}/driver`, `/sys/bus/pci/drivers/${fn.driver}`);
    }
    return directory;
  }

  /** A block device or network interface of a function. */
  async classDevice(kind: "block" | "net", name: string, directory: string, number = "0:0"): Promise<void> {
    const path = `${directory}/virtio0/${kind}/${name}`;
    await this.files({ [`${path}/dev`]: `${number}\n` });
    await this.link(`/sys/class/${kind}/${name}`, path);
  }

  async driverOf(address: string): Promise<string | undefined> {
    return await this.machine.linkName(`${DEVICES}/${address}/driver`);
  }

  async write(path: string, text: string): Promise<void> {
    const value = text.trim();
    this.log.push(`${value} > ${path}`);
    const errno = this.failures.get(path) ?? this.failures.get(`${value} > ${path}`);
    if (errno !== undefined) throw new SystemError(`write ${path}`, errno);
    if (path.endsWith("/driver_override")) await Bun.write(this.at(path), value === "" ? "(null)\n" : text);
    else if (path.endsWith("/driver/unbind")) await rm(this.at(dirname(path)));
    else if (path.endsWith("/drivers_probe")) await this.probe(value);
    else if (path.endsWith("/sriov_numvfs")) await this.makeVfs(dirname(path), Number(value));
    else await Bun.write(this.at(path), text);
  }

  async run(command: readonly string[]): Promise<string> {
    this.log.push(command.join(" "));
    const [, name = ""] = command;
    if (name.startsWith("pci:")) await this.probe(name.slice("pci:".length), true);
    else await this.driver(name);
    return "";
  }

  async isClaimed(path: string): Promise<boolean> {
    return this.claimed.has(path);
  }

  /** Drivers whose module is loaded only when their alias is asked for. */
  readonly unloaded = new Set<string>();

  private async probe(address: string, loads = false): Promise<void> {
    if ((await this.driverOf(address)) !== undefined) return;
    const override = await this.machine.text(`${DEVICES}/${address}/driver_override`);
    const name = override === "(null)" ? this.natural.get(address) : override;
    if (name === undefined || this.refusing.has(name) || (this.unloaded.has(name) && !loads)) return;
    await this.link(`${await this.machine.resolve(`${DEVICES}/${address}`)}/driver`, `/sys/bus/pci/drivers/${name}`);
  }

  private async makeVfs(pf: string, count: number): Promise<void> {
    await Bun.write(this.at(`${pf}/sriov_numvfs`), `${count}\n`);
    const directory = (await this.machine.resolve(pf))!;
    for (const name of await this.machine.names(pf)) {
      if (!name.startsWith("virtfn")) continue;
      const address = (await readlink(this.at(`${directory}/${name}`))).split("/").at(-1)!;
      await rm(this.at(`${directory}/${name}`));
      await rm(this.at(`${DEVICES}/${address}`));
    }
    const autoprobe = (await this.machine.text(`${pf}/sriov_drivers_autoprobe`)) !== "0";
    for (let index = 0; index < count; index++) {
      const address = parsePciAddress(`0000:0a:10.${index}`);
      const driver = autoprobe ? { driver: "vfio-pci" } : {};
      const vf = await this.function({ address, group: this.nextGroup++, ...driver });
      await this.link(`${vf}/physfn`, directory);
      await this.link(`${directory}/virtfn${index}`, vf);
    }
  }

  private at(path: string): string {
    return join(this.root, path);
  }
}
