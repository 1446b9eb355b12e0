import { Deadline } from "../../../src/base/deadline.ts";
import { VhostdError } from "../../../src/base/errors.ts";
import { silentLogger } from "../../../src/base/log.ts";
import { fileInfo, memfd } from "../../../src/native/sys.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import { Bus } from "../../../src/pci/bus.ts";
import { DmaDomain } from "../../../src/pci/dma-domain.ts";
import { VfioAddressSpace, type VfioInterface } from "../../../src/pci/vfio/address-space.ts";

/**
 * A process of its own, for limits that hold for a process: maps memory for a function.
 * Arguments: interface, PCI address, sizes in MiB, mapped one after the other. Prints what came of each, as JSON: code,
 * message and fix of an error.
 */
const [wanted = "", address = "", ...sizes] = process.argv.slice(2);
const settings = { interface: wanted as VfioInterface, token: async () => "", log: silentLogger };
const domain = new DmaDomain(new VfioAddressSpace("a VM", settings));
const entry = await new Bus(["/sys/bus/pci/devices"]).find(parsePciAddress(address));
const fn = await domain.open(entry!, Deadline.after(60_000, "opening"));
await domain.attach(fn);
console.log(JSON.stringify(await Array.fromAsync(sizes, (megabytes) => map(Number(megabytes) * 2 ** 20))));
await domain.detach(fn);
await fn[Symbol.asyncDispose]();
domain.abandon();

async function map(size: number): Promise<unknown> {
  using file = memfd("locked-program", size);
  const { dev, ino } = fileInfo(file.number);
  try {
    await domain.claim("test", { iova: 0, size, offset: 0, file: { dev, ino } }, file.number);
  } catch (error) {
    if (!(error instanceof VhostdError)) throw error;
    const { code, message, fix } = error;
    return { code, message, fix };
  }
  await domain.releaseAll("test");
  return "mapped";
}
