import { join } from "node:path";
import { type FunctionDescription, type MachineDescription, SRIOV_VFS } from "./description.ts";
import type { MachineImage } from "./image.ts";

/** Name of the virtio-serial port through which the machine reaches QEMU's QMP. */
export const QMP_PORT = "qmp";
/** Of all virtio functions: behind the IOMMU, as hardware is, and version 1. */
const BEHIND_IOMMU = { iommu_platform: true, "disable-legacy": "on" } as const;

/** Files and folders of one run on the host. */
export interface MachinePaths {
  /** The share that the machine can write: its start script, results, output. */
  readonly share: string;
  /** Where disks and sockets are. */
  readonly work: string;
  readonly console: string;
}

/** QEMU's arguments for the machine. */
export function machineArguments(
  description: MachineDescription,
  image: MachineImage,
  paths: MachinePaths,
  kernelParameters: readonly string[],
): string[] {
  const { memory, processors, addressBits, functions } = description;
  const qmp = join(paths.work, "qmp");
  const parameters = [
    ...["console=ttyS0", "quiet", "panic=-1", "tsc=reliable", "no_timer_check"],
    ...["intel_iommu=on", "iommu=pt", ...kernelParameters],
  ];
  return [
    ...["-name", "machine", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"],
    // The firmware is to leave the functions alone: it would use them until the kernel has started the IOMMU.
    ...["-boot", "strict=on"],
    ...["-M", "q35,kernel-irqchip=split", "-accel", "tcg,thread=multi", "-cpu", "max"],
    ...["-smp", `${processors}`, "-m", `${memory}M`],
    // PCIe's own hot-plug, as on servers, not ACPI's.
    ...["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"],
    // Before every other device: those that come first are not behind it.
    ...["-device", `intel-iommu,intremap=on,aw-bits=${addressBits}`],
    ...["-kernel", image.kernel, "-initrd", image.initramfs, "-append", parameters.join(" ")],
    ...["-serial", `file:${paths.console}`],
    ...["-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"],
    ...["-device", "virtio-9p-pci,fsdev=host,mount_tag=host,addr=0x2"],
    ...["-fsdev", `local,id=share,path=${paths.share},security_model=none`],
    ...["-device", "virtio-9p-pci,fsdev=share,mount_tag=machine,addr=0x3"],
    // QEMU's own QMP, through QEMU, to the machine.
    ...["-qmp", `unix:${qmp},server=on,wait=off`],
    ...["-device", "virtio-serial-pci,addr=0x4", "-chardev", `socket,id=inside,path=${qmp}`],
    ...["-device", `virtserialport,chardev=inside,name=${QMP_PORT}`],
    ...ports(functions),
    ...functions.flatMap((one) => functionArguments(one, paths.work)),
  ];
}

/** Path of a disk's image. */
export function diskImage(work: string, { id }: FunctionDescription): string {
  return join(work, `${id}.img`);
}

/** A root port for each function, and the bridge for those that share a group. */
function ports(functions: readonly FunctionDescription[]): string[] {
  const all = [...new Set(functions.map(({ port }) => port))];
  const bridged = functions.find(({ bridgeSlot }) => bridgeSlot !== undefined)?.port;
  return all.flatMap((port, index) => [
    ...["-device", `pcie-root-port,id=${portId(port)},chassis=${index + 1},slot=${index + 1},addr=0x${slotOf(port)}`],
    ...(port === bridged ? ["-device", `pcie-pci-bridge,id=bridge,bus=${portId(port)}`] : []),
  ]);
}

/** What the function stands on, and the function. */
function functionArguments(described: FunctionDescription, work: string): string[] {
  const { kind, id } = described;
  // QEMU wants the VFs before their PF.
  const vfs =
    kind === "sriov" ? Array.from({ length: SRIOV_VFS }, (_, index) => virtualFunction(described, index)) : [];
  return [
    ...(described.size === undefined ? hubPort(id) : disk(described, work)),
    ...vfs.flatMap((vf) => [...hubPort(`${vf["id"]}`), "-device", JSON.stringify(vf)]),
    ...["-device", JSON.stringify(functionDevice(described))],
  ];
}

/** A device as `-device` and `device_add` take it. */
type Device = Readonly<Record<string, string | number | boolean>>;

/** The function itself. */
export function functionDevice(described: FunctionDescription): Device {
  const { kind, id, port, bridgeSlot, queues, pagePerVq, serial, mac } = described;
  const place = bridgeSlot === undefined ? { bus: portId(port) } : { bus: "bridge", addr: `${bridgeSlot}` };
  const common = { id, ...place, ...BEHIND_IOMMU, "page-per-vq": pagePerVq };
  // Advanced error reporting is a capability of PCIe; and QEMU has no room for it and SR-IOV.
  const errors = kind === "blk" || kind === "net" ? { aer: true } : {};
  if (serial !== undefined) {
    return { driver: "virtio-blk-pci", ...common, ...errors, drive: `${id}-disk`, serial, "num-queues": queues };
  }
  const network = { driver: "virtio-net-pci", ...common, ...errors, netdev: `${id}-hub`, mac: mac ?? "", romfile: "" };
  return kind === "sriov" ? { ...network, addr: "0.0" } : network;
}

function virtualFunction(pf: FunctionDescription, index: number): Device {
  const id = `${pf.id}v${index}`;
  const place = { bus: portId(pf.port), addr: `0.${index + 1}`, "sriov-pf": pf.id };
  return { driver: "virtio-net-pci", id, ...place, ...BEHIND_IOMMU, netdev: `${id}-hub`, romfile: "" };
}

/** A node of its own, which stays when the function is unplugged. */
function disk(described: FunctionDescription, work: string): string[] {
  const file = { driver: "file", filename: diskImage(work, described) };
  const node = {
    driver: "raw",
    "node-name": `${described.id}-disk`,
    cache: { "no-flush": true },
    discard: "unmap",
    file,
  };
  return ["-blockdev", JSON.stringify(node)];
}

function hubPort(id: string): string[] {
  return ["-netdev", `hubport,id=${id}-hub,hubid=0`];
}

function portId(port: string): string {
  return `port${slotOf(port)}`;
}

/** "0000:00:1a.0" → "1a". */
function slotOf(port: string): string {
  return port.slice(8, 10);
}
