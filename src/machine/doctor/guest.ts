import type { Machine } from "../machine.ts";
import { bad, type Finding, ok, warn } from "./finding.ts";
import { isOn, parseSize, type QemuOption } from "./qemu-options.ts";

/** A vhost-user device of a guest. */
interface FrontEnd {
  /** QEMU's name of it. */
  readonly driver: string;
  readonly values: ReadonlyMap<string, string>;
  /** Pairs of queues of a network card, queues of others. */
  readonly queues: number;
  readonly isPaired: boolean;
}

/** What a guest's options tell. */
export interface Guest {
  readonly findings: readonly Finding[];
  /** Its vhost-user sockets. */
  readonly sockets: readonly string[];
  readonly uuid: string | undefined;
  /** What it wants of huge pages of a size, bytes. */
  readonly hugePages: { readonly bytes: number; readonly page: number } | undefined;
}

const MEMORY_FIX =
  "-object memory-backend-memfd,id=mem,size=…,share=on -numa node,memdev=mem (libvirt: memAccess='shared')";
const MIB = 1 << 20;
const DEFAULT_HUGE_PAGE = 2 * MIB;

/** Checks the options of a guest, running or not. */
export async function checkGuest(machine: Machine, options: readonly QemuOption[]): Promise<Guest> {
  const devices = options.filter(({ name }) => name === "device");
  const frontEnds = findFrontEnds(options);
  const findings = [
    ...(await checkMemory(machine, options)),
    ...checkConfidential(options),
    ...checkIommu(options, devices),
    ...devices.flatMap(checkDiscard),
    ...frontEnds.flatMap(checkFrontEnd),
  ];
  if (frontEnds.length === 0) {
    const fix = "-chardev socket,…,server=on with -device vhost-user-blk-pci or -netdev vhost-user";
    findings.push(warn("guest", "it has no vhost-user device", fix));
  }
  if (options.some(({ name }) => name === "readconfig")) {
    findings.push(warn("guest", "what -readconfig adds is not checked", "give its options on the command line"));
  }
  return {
    findings,
    sockets: findSockets(options, frontEnds),
    uuid: options.find(({ name }) => name === "uuid")?.values.get(""),
    hugePages: wantedHugePages(options),
  };
}

function findFrontEnds(options: readonly QemuOption[]): FrontEnd[] {
  const devices = options.filter(({ name }) => name === "device").map(({ values }) => values);
  const cards = options.filter(({ name, values }) => name === "netdev" && values.get("") === "vhost-user");
  const others = devices
    .filter((values) => values.get("")?.startsWith("vhost-user-") === true)
    .map((values) => ({
      driver: values.get("")!,
      values,
      queues: Number(values.get("num-queues") ?? 1),
      isPaired: false,
    }));
  const paired = cards.flatMap(({ values: card }) => {
    const values = devices.find((device) => device.get("netdev") === card.get("id"));
    if (values === undefined) return [];
    return [{ driver: values.get("") ?? "", values, queues: Number(card.get("queues") ?? 1), isPaired: true }];
  });
  return [...others, ...paired];
}

function findSockets(options: readonly QemuOption[], frontEnds: readonly FrontEnd[]): string[] {
  const used = new Set(frontEnds.map(({ values }) => values.get("chardev")));
  for (const { name, values } of options) {
    if (name === "netdev" && values.get("") === "vhost-user") used.add(values.get("chardev"));
  }
  return options.flatMap(({ name, values }) => {
    const path = values.get("path") ?? values.get("addr.data.path");
    return name === "chardev" && used.has(values.get("id")) && path !== undefined ? [path] : [];
  });
}

/** The memory that the guest's RAM is made of. */
function memoryBackends(options: readonly QemuOption[]): ReadonlyMap<string, string>[] {
  const used = new Set(
    options.flatMap(({ name, values }) => {
      if (name === "numa" || name === "device") return [values.get("memdev")];
      return name === "machine" || name === "M" ? [values.get("memory-backend")] : [];
    }),
  );
  return options
    .filter(({ name, values }) => name === "object" && values.get("")?.startsWith("memory-backend-") === true)
    .map(({ values }) => values)
    .filter((values) => used.has(values.get("id")));
}

async function checkMemory(machine: Machine, options: readonly QemuOption[]): Promise<Finding[]> {
  const check = "guest memory";
  const backends = memoryBackends(options);
  if (backends.length === 0) return [bad(check, "it is private to QEMU: no device can reach it", MEMORY_FIX)];
  const findings = await Promise.all(
    backends.map(async (values) => {
      const seen = `${values.get("")} "${values.get("id")}"`;
      if (!isOn(values, "share")) return bad(check, `${seen} is not shared (share=on)`, MEMORY_FIX);
      if (values.get("") === "memory-backend-ram") return bad(check, `${seen} has no file`, MEMORY_FIX);
      if (values.get("") !== "memory-backend-file") return ok(check, `${seen}: shared`);
      const path = values.get("mem-path") ?? "";
      const type = await fileSystemOf(machine, path);
      if (type === "tmpfs" || type === "hugetlbfs") return ok(check, `${seen}: shared, on ${type}`);
      return bad(
        check,
        `${seen}: ${path} is on ${type ?? "an unknown file system"}`,
        "use hugetlbfs, tmpfs or a memfd",
      );
    }),
  );
  return findings;
}

/** Of the mount point that the path is below. */
async function fileSystemOf(machine: Machine, path: string): Promise<string | undefined> {
  let best = { point: "", type: undefined as string | undefined };
  for (const line of await machine.lines("/proc/self/mountinfo")) {
    const [fields = "", more = ""] = line.split(" - ");
    const point = fields.split(" ")[4] ?? "";
    const isAbove = path === point || path.startsWith(point === "/" ? "/" : `${point}/`);
    if (isAbove && point.length >= best.point.length) best = { point, type: more.split(" ")[0] };
  }
  return best.type;
}

function wantedHugePages(options: readonly QemuOption[]): Guest["hugePages"] {
  const huge = memoryBackends(options).filter((values) => isOn(values, "hugetlb"));
  const [first] = huge;
  if (first === undefined) return undefined;
  const page = parseSize(first.get("hugetlbsize") ?? "", 1) || DEFAULT_HUGE_PAGE;
  return { page, bytes: huge.reduce((sum, values) => sum + parseSize(values.get("size") ?? "", 1), 0) };
}

function checkConfidential(options: readonly QemuOption[]): Finding[] {
  const found = options.find(
    ({ name, values }) =>
      (name === "object" && /^(sev|sev-snp|tdx|s390-pv|pef)-guest$/.test(values.get("") ?? "")) ||
      ((name === "machine" || name === "M") && values.has("confidential-guest-support")),
  );
  const fix = "run it without; no device may read such a guest's memory";
  return found === undefined ? [] : [bad("confidential guest", "its memory is encrypted", fix)];
}

function checkIommu(options: readonly QemuOption[], devices: readonly QemuOption[]): Finding[] {
  const unit = [...devices, ...options.filter(({ name }) => name === "machine" || name === "M")]
    .map(({ name, values }) => (name === "device" ? values.get("") : values.get("iommu")))
    .find((value) => value !== undefined && /iommu|smmu/.test(value));
  if (unit === undefined) return [];
  const seen = `the guest has an IOMMU of its own (${unit})`;
  return [warn("vIOMMU", seen, "leave iommu_platform off for its vhost-user devices: they bypass it")];
}

/** Devices by which memory that is pinned would be given away, and later be another page than the function's. */
function checkDiscard({ values }: QemuOption): Finding[] {
  const driver = values.get("") ?? "";
  if (driver.startsWith("virtio-mem")) {
    const fix = "use pc-dimm; what virtio-mem takes away stays pinned, and comes back as other pages";
    return [bad("virtio-mem", "the guest has one", fix)];
  }
  if (!driver.startsWith("virtio-balloon")) return [];
  if (isOn(values, "free-page-reporting")) {
    const fix = "free-page-reporting=off: QEMU gives away pages that the function goes on using, and data is lost";
    return [bad("balloon", "it reports free pages", fix)];
  }
  return [
    warn("balloon", "the guest has one", "never inflate it (virsh setmem), or leave it out (-device virtio-balloon)"),
  ];
}

function checkFrontEnd({ driver, values, queues, isPaired }: FrontEnd): Finding[] {
  const check = `${driver}${values.has("id") ? ` "${values.get("id")}"` : ""}`;
  const findings: Finding[] = [];
  const wrong = (finding: Finding) => findings.push(finding);
  if (isOn(values, "iommu_platform")) {
    wrong(bad(check, "iommu_platform=on: its addresses would be the vIOMMU's", "leave iommu_platform off"));
  }
  if (isOn(values, "packed")) wrong(warn(check, "packed=on: not served", "leave it off; the rings are split ones"));
  if (!isOn(values, "disable-legacy")) {
    wrong(warn(check, "disable-legacy=on is missing: a legacy driver cannot be served", "add disable-legacy=on"));
  }
  if (!isOn(values, "page-per-vq")) {
    wrong(warn(check, "page-per-vq=on is missing: kicks leave the guest", "add page-per-vq=on"));
  }
  if (isPaired && queues > 1 && !isOn(values, "mq")) {
    wrong(warn(check, `${queues} pairs of queues, but no mq=on: the guest uses one`, "add mq=on"));
  }
  const wanted = isPaired ? 2 * queues + 2 : queues + 1;
  const vectors = values.get("vectors");
  if (vectors !== undefined && Number(vectors) < wanted) {
    wrong(warn(check, `vectors=${vectors}: its queues share interrupts`, `vectors=${wanted}`));
  }
  return findings.length > 0 ? findings : [ok(check, `${queues} ${isPaired ? "pairs of queues" : "queues"}`)];
}
