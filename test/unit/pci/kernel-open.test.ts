import { afterEach, beforeEach, expect, mock, test } from "bun:test";
import * as fs from "node:fs";
import { Deadline } from "../../../src/base/deadline.ts";
import { SystemError } from "../../../src/base/errors.ts";
import { silentLogger } from "../../../src/base/log.ts";
import { liveFds } from "../../../src/native/fd.ts";
import * as slow from "../../../src/native/slow.ts";
import { eventfd } from "../../../src/native/sys.ts";
import { parsePciAddress } from "../../../src/pci/address.ts";
import type { KernelEntry } from "../../../src/pci/vfio/iommu.ts";
import * as uapi from "../../../src/pci/vfio/iommu-uapi.ts";
import { parseType1Info } from "../../../src/pci/vfio/iova-ranges.ts";
import { FakeFunction } from "../../kit/fake-function.ts";
import { rejection } from "../../kit/rejection.ts";

/** How functions are opened and attached, with a kernel made of JavaScript. */

const E2BIG = 7;
const EIO = 5;
const EAGAIN = 11;
const EINVAL = 22;
const TOKEN = "8d2c5b1e-6f0a-4b43-9c55-1f6f3f0e7a11";
const NAMES = new Map(
  Object.values(uapi)
    .filter((value) => typeof value === "object" && "name" in value && "number" in value)
    .map(({ name, number }) => [number, name]),
);

/** Names of the requests that were made, in order, and the files that were opened. */
let asked: string[] = [];
/** What the kernel does at a request of this name, instead of success. */
let answers: Record<string, (argument: Uint8Array) => number> = {};
/** The function that is opened; what the kernel does with its device is not the matter here. */
let fn: FakeFunction;

mock.module("../../../src/pci/vfio/device-file.ts", () => ({
  openDeviceFile: async (path: string) => {
    asked.push(path);
    return eventfd();
  },
}));
mock.module("../../../src/native/slow.ts", () => ({
  ...slow,
  slowIoctl: async (_fd: number, number: number, argument: Uint8Array) => {
    const name = NAMES.get(number) ?? "";
    asked.push(name);
    return answers[name]?.(argument) ?? 0;
  },
}));
mock.module("../../../src/pci/vfio/function.ts", () => ({
  VfioFunction: {
    over: async (_entry: unknown, device: ReturnType<typeof eventfd>, leave: () => void) =>
      Object.assign(fn, {
        deviceFd: device.number,
        [Symbol.asyncDispose]: async () => {
          device[Symbol.dispose]();
          leave();
        },
      }),
  },
}));
mock.module("node:fs", () => ({ ...fs, existsSync: (path: string) => path === "/dev/iommu" || fs.existsSync(path) }));
const { VfioAddressSpace } = await import("../../../src/pci/vfio/address-space.ts");

beforeEach(() => {
  asked = [];
  fn = new FakeFunction();
  answers = {
    VFIO_CHECK_EXTENSION: () => 1,
    VFIO_GROUP_GET_STATUS: (argument) => {
      uapi.GROUP_STATUS.write(argument, { flags: uapi.GROUP_VIABLE });
      return 0;
    },
    VFIO_IOMMU_GET_INFO: (argument) => {
      argument.set(type1Info());
      return 0;
    },
    VFIO_GROUP_GET_DEVICE_FD: () => eventfd().release(),
  };
});
afterEach(async () => {
  await Deadline.after(1000, "the fds").poll(() => liveFds() === 0 || undefined, 1);
});

/** All of 48 bits. */
function type1Info(): Uint8Array {
  const info = new Uint8Array(56);
  uapi.TYPE1_INFO.write(info, { argsz: 56, flags: 3, iova_pgsizes: 4096n, cap_offset: 24 });
  const capability = info.subarray(24);
  uapi.INFO_CAPABILITY.write(capability, { id: uapi.Type1Capability.iovaRange, version: 1, next: 0 });
  uapi.CAP_IOVA_RANGE.write(capability, { nr_iovas: 1 });
  uapi.IOVA_RANGE.write(info.subarray(40), { start: 0n, last: 2n ** 48n - 1n });
  expect(parseType1Info(info).ranges).toHaveLength(1);
  return info;
}

/** @param until tries that fail so; all unless said */
function failing(errno: number, until = Number.POSITIVE_INFINITY, then: () => number = () => 0): () => number {
  let tries = 0;
  return () => {
    if (++tries > until) return then();
    throw new SystemError("ioctl", errno);
  };
}

function count(name: string): number {
  return asked.filter((one) => one === name).length;
}

function space(kind: "auto" | "group" | "iommufd") {
  return new VfioAddressSpace("a VM", { interface: kind, token: async () => TOKEN, log: silentLogger });
}

function entry(takesToken: boolean): KernelEntry {
  const transport = { kind: "vfio", driver: "vfio-pci", group: 4242, cdev: "vfio4242", numaNode: undefined } as const;
  return {
    ...{ address: parsePciAddress("5a:00.1"), directory: "/nowhere", vendor: 0x1af4, device: 0x1042, class: 0 },
    ...{ physfn: undefined, virtfns: new Map(), transport: { ...transport, takesToken } },
  };
}

const soon = (milliseconds = 10_000) => Deadline.after(milliseconds, "the test");

for (const errno of [EINVAL, E2BIG]) {
  test(`a token that the kernel does not take for the function's file (errno ${errno}) is given with the group`, async () => {
    answers.VFIO_DEVICE_BIND_IOMMUFD = failing(errno);
    using vm = space("auto");
    await using _opened = await vm.open(entry(true), soon());
    expect(vm.interface).toBe("group");
    expect(count("VFIO_DEVICE_BIND_IOMMUFD")).toBe(1);
  });

  test(`where the group is not to be used errno ${errno} is explained`, async () => {
    answers.VFIO_DEVICE_BIND_IOMMUFD = failing(errno);
    using vm = space("iommufd");
    const error = await rejection(vm.open(entry(true), soon(2000)));
    expect(error).toMatchObject({ code: "notSupported", fix: expect.stringContaining("Linux 6.19") });
    expect(error.message).toContain("takes no vf-token");
    // A function that is open elsewhere is answered with EINVAL, too.
    expect(count("VFIO_DEVICE_BIND_IOMMUFD") > 1).toBe(errno === EINVAL);
  });
}

test("a function that is being closed elsewhere is opened with its token once it is, also as the second one", async () => {
  using vm = space("iommufd");
  answers.VFIO_DEVICE_BIND_IOMMUFD = failing(EINVAL, 2);
  await using _first = await vm.open(entry(true), soon());
  using other = space("auto");
  answers.VFIO_DEVICE_BIND_IOMMUFD = failing(EINVAL, 0);
  await (await other.open(entry(false), soon()))[Symbol.asyncDispose]();
  fn = new FakeFunction();
  answers.VFIO_DEVICE_BIND_IOMMUFD = failing(EINVAL, 2);
  await using _second = await other.open(entry(true), soon());
  expect(other.interface).toBe("iommufd");
});

for (const [kind, name, success] of [
  ["group", "VFIO_GROUP_GET_DEVICE_FD", () => eventfd().release()],
  ["iommufd", "VFIO_DEVICE_BIND_IOMMUFD", () => 0],
] as const) {
  test(`${kind}: a function that somebody resets is opened after that, or it is said`, async () => {
    answers[name] = failing(EAGAIN, 2, success);
    {
      using vm = space(kind);
      await using _opened = await vm.open(entry(false), soon());
      expect(count(name)).toBe(3);
    }
    answers[name] = failing(EAGAIN);
    using vm = space(kind);
    const error = await rejection(vm.open(entry(false), soon(2000)));
    expect(error).toMatchObject({ code: "busy", fix: expect.stringContaining("/reset") });
    expect(error.message).toContain("somebody resets it");
  });
}

test("a function is detached again where it cannot be told which addresses can be mapped", async () => {
  using vm = space("iommufd");
  await using opened = await vm.open(entry(false), soon());
  answers.IOMMU_IOAS_IOVA_RANGES = failing(EIO);
  expect(await rejection(vm.attach(opened, [], soon()))).toMatchObject({ errno: EIO });
  expect(asked.slice(-2)).toEqual(["IOMMU_IOAS_IOVA_RANGES", "VFIO_DEVICE_DETACH_IOMMUFD_PT"]);
});

test("a function is detached also where its configuration space cannot be read", async () => {
  using vm = space("iommufd");
  await using opened = await vm.open(entry(false), soon());
  fn.config.read = () => Promise.reject(new SystemError("pread", EIO));
  expect(await rejection(vm.detach(opened, [], soon()))).toMatchObject({ errno: EIO });
  expect(asked.at(-1)).toBe("VFIO_DEVICE_DETACH_IOMMUFD_PT");
});
