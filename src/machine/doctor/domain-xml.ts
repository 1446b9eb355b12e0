/**
 * What the XML of a libvirt domain means, in the words of QEMU's command line: only what the checks of a guest look at
 * (https://libvirt.org/formatdomain.html). It is looked through, not validated.
 */
export function domainOptions(xml: string): string[] {
  const options = [...memoryOptions(xml), ...deviceOptions(xml)];
  const given = [...xml.matchAll(/<qemu:arg\s+value=(?:'([^']*)'|"([^"]*)")/g)];
  return [...options, ...given.map(([, single, double]) => unescapeXml(single ?? double ?? ""))];
}

function memoryOptions(xml: string): string[] {
  const shared = /<cell\b[^>]*\bmemAccess=['"]shared['"]/.test(xml) || /<access\b[^>]*\bmode=['"]shared['"]/.test(xml);
  const backing = /<memoryBacking>([\s\S]*?)<\/memoryBacking>/.exec(xml)?.[1] ?? "";
  const [, unit = "KiB", amount = "0"] = /<memory\b(?:[^>]*\bunit=['"](\w+)['"])?[^>]*>(\d+)</.exec(xml) ?? [];
  const size = `${amount}${unit.charAt(0)}`;
  const huge = backing.includes("<hugepages");
  const [, pageSize, pageUnit = "KiB"] =
    /<page\b[^>]*\bsize=['"](\d+)['"](?:[^>]*\bunit=['"](\w+)['"])?/.exec(backing) ?? [];
  const page = huge && pageSize !== undefined ? `,hugetlbsize=${pageSize}${pageUnit.charAt(0)}` : "";
  // libvirt makes memory of files below /var/lib/libvirt where nothing says otherwise; huge pages are files on hugetlbfs.
  const kind =
    huge || /type=['"]memfd['"]/.test(backing) ? "memfd" : /type=['"]file['"]/.test(backing) ? "file" : "ram";
  const object = `memory-backend-${kind},id=domain,size=${size},share=${shared ? "on" : "off"}`;
  const path = kind === "file" ? ",mem-path=/var/lib/libvirt/qemu/ram" : "";
  return ["-object", `${object}${huge ? ",hugetlb=on" : ""}${page}${path}`, "-machine", "none,memory-backend=domain"];
}

function deviceOptions(xml: string): string[] {
  const options: string[] = [];
  const device = (text: string) => options.push("-device", text);
  if (/<memballoon\b[^>]*\bfreePageReporting=['"]on['"]/.test(xml)) device("virtio-balloon-pci,free-page-reporting=on");
  else if (/<memballoon\b[^>]*\bmodel=['"]virtio/.test(xml)) device("virtio-balloon-pci");
  if (/<memory\b[^>]*\bmodel=['"]virtio-mem['"]/.test(xml)) device("virtio-mem-pci");
  const iommu = /<iommu\b[^>]*\bmodel=['"](intel|virtio|amd)['"]/.exec(xml)?.[1];
  if (iommu !== undefined) device(`${iommu}-iommu`);
  const secrecy = /<launchSecurity\b[^>]*\btype=['"]([\w-]+)['"]/.exec(xml)?.[1];
  if (secrecy !== undefined) options.push("-object", `${secrecy}-guest,id=secrecy`);
  const uuid = /<uuid>([^<]+)<\/uuid>/.exec(xml)?.[1];
  if (uuid !== undefined) options.push("-uuid", uuid.trim());
  const parts = xml.matchAll(/<(interface|disk)\b[^>]*\btype=['"]vhostuser['"][^>]*>([\s\S]*?)<\/\1>/g);
  for (const [index, [, kind, body = ""]] of [...parts].entries()) {
    const path = /<source\b[^>]*\bpath=['"]([^'"]+)['"]/.exec(body)?.[1] ?? "";
    const server = /<source\b[^>]*\bmode=['"]server['"]/.test(body) ? "on" : "off";
    options.push("-chardev", `socket,id=xml${index},path=${path.replaceAll(",", ",,")},server=${server}`);
    const driver = /<driver\b([^>]*)/.exec(body)?.[1] ?? "";
    const value = (name: string) => new RegExp(`\\b${name}=['"]([^'"]+)['"]`).exec(driver)?.[1];
    const queues = value("queues") ?? "1";
    const common = [
      ...(value("page_per_vq") === "on" ? ["page-per-vq=on"] : []),
      ...(value("packed") === "on" ? ["packed=on"] : []),
      ...(value("iommu") === "on" ? ["iommu_platform=on"] : []),
      // libvirt puts its virtio devices behind PCIe ports, where they are modern by themselves.
      "disable-legacy=on",
    ].join(",");
    if (kind === "disk") device(`vhost-user-blk-pci,chardev=xml${index},num-queues=${queues},${common}`);
    else {
      options.push("-netdev", `vhost-user,id=xmlnic${index},chardev=xml${index},queues=${queues}`);
      device(`virtio-net-pci,netdev=xmlnic${index},mq=${queues === "1" ? "off" : "on"},${common}`);
    }
  }
  return options;
}

function unescapeXml(text: string): string {
  const entities: Readonly<Record<string, string>> = { lt: "<", gt: ">", quot: '"', apos: "'", amp: "&" };
  return text.replace(/&(lt|gt|quot|apos|amp);/g, (_, name: string) => entities[name]!);
}
