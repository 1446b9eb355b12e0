/** Runs in the machine: how long the daemon and a bare program take to open a function and to let it go again. */
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { silentLogger } from "../../src/base/log.ts";
import { nullKeeper } from "../../src/daemon/keeper.ts";
import { DeviceRegistry } from "../../src/daemon/registry.ts";
import { stopNative } from "../../src/native/stop.ts";
import { parsePciAddress } from "../../src/pci/address.ts";
import { Bus } from "../../src/pci/bus.ts";
import { BUILT_IN_PLUGINS, PluginRegistry } from "../../src/plugin-host.ts";
import { Machine } from "../kit/machine/inside.ts";
import { output } from "./native.ts";

const RUNS = 9;
/** The first runs find cold files, and code that was not compiled yet. */
const WARM_UP = 12;
const FUNCTION = "blk0";

/** Milliseconds of each run. */
export interface AttachTimes {
  readonly bare: readonly number[];
  readonly daemon: readonly number[];
}

if (import.meta.main) {
  const [program = ""] = process.argv.slice(2);
  console.log(JSON.stringify(await measure(program)));
  stopNative();
  process.exit();
}

async function measure(program: string): Promise<AttachTimes> {
  await using undo = new AsyncDisposableStack();
  const fn = Machine.here().function(FUNCTION);
  undo.use(fn.bind());
  const directory = await mkdtemp(join(tmpdir(), "attach-"));
  undo.defer(() => rm(directory, { recursive: true }));
  const address = parsePciAddress(fn.address);
  const registry = new DeviceRegistry({
    bus: new Bus(["/sys/bus/pci/devices"]),
    plugins: await PluginRegistry.load({ builtIn: BUILT_IN_PLUGINS, plugins: [] }, silentLogger),
    keeper: nullKeeper,
    log: silentLogger,
  });
  undo.defer(() => registry.close());
  const daemonOnce = async () => {
    const begin = performance.now();
    await registry.addVf({ address, socket: join(directory, "vhost.sock"), mode: "server", unmanaged: true });
    await registry.removeVf(address);
    return performance.now() - begin;
  };
  const times = { bare: [] as number[], daemon: [] as number[] };
  for (let run = 0; run < WARM_UP + RUNS; run++) {
    times.bare.push(Number(await output([program, `${fn.group}`, address])) / 1e6);
    times.daemon.push(await daemonOnce());
  }
  return { bare: times.bare.slice(WARM_UP), daemon: times.daemon.slice(WARM_UP) };
}
