import { afterEach, expect } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { liveFds } from "../../../src/native/fd.ts";
import { VfioFunction } from "../../../src/pci/vfio/function.ts";
import { holdFds } from "../native/open-fds.ts";
import { ENTRY, FakeVfioDevice } from "./fake-vfio-device.ts";

const undo = new Set<AsyncDisposable | Disposable>();

export const soon = (ms = 1000) => Deadline.after(ms, "the test");

/** What each test of the file has opened by `use` and `open` is closed after it, and nothing else is left. */
export function closeAfterEach(): void {
  afterEach(async () => {
    for (const one of [...undo].reverse())
      await (Symbol.asyncDispose in one ? one[Symbol.asyncDispose]() : one[Symbol.dispose]());
    undo.clear();
    expect(liveFds()).toBe(0);
  });
  // After the hook above: what that closes counts.
  holdFds();
}

export function use<T extends AsyncDisposable | Disposable>(value: T): T {
  undo.add(value);
  return value;
}

/** A function over a fake of the kernel's device. `left` tells of each time that it was left whether its fd was closed. */
export async function open(prepare: (device: FakeVfioDevice) => void = () => {}) {
  const device = use(new FakeVfioDevice());
  prepare(device);
  const left: string[] = [];
  const leave = () => left.push(device.fd.closed ? "closed" : "open");
  const fn = use(await VfioFunction.over(ENTRY, device.fd, leave, soon(), device.calls));
  return { device, fn, left };
}

/** The mappings of the fake's file in this process. */
export async function mappings(): Promise<number> {
  const maps = await Bun.file("/proc/self/maps").text();
  return maps.split("\n").filter((line) => line.includes("memfd:vfio-device")).length;
}
