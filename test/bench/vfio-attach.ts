/** Runs in the machine: how long the daemon and a bare program take to open a function and to let it go again. */
import { Deadline } from "../../src/base/deadline.ts";
import { stopNative } from "../../src/native/stop.ts";
import { RpcClient } from "../../src/rpc/client.ts";
import { MachineLab } from "../kit/machine/lab.ts";
import { output } from "./native.ts";

const RUNS = 9;
/** The first runs find cold files, and code that was not compiled yet. */
const WARM_UP = 12;
const FUNCTION = "blk0";
const TIMEOUT = 120_000;

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
  await using lab = await MachineLab.create();
  const [device] = lab.bind(FUNCTION);
  const { group } = lab.machine.function(FUNCTION);
  using client = await RpcClient.connect(lab.rpcSocket, Deadline.after(TIMEOUT, "the daemon"));
  const call = (method: string, parameters: Readonly<Record<string, unknown>>) =>
    client.call(method, parameters, Deadline.after(TIMEOUT, method));
  const daemonOnce = async () => {
    const begin = performance.now();
    await call("vf.add", { device, socket: lab.socket(device), mode: "server", unmanaged: true });
    await call("vf.remove", { device });
    return performance.now() - begin;
  };
  const times = { bare: [] as number[], daemon: [] as number[] };
  for (let run = 0; run < WARM_UP + RUNS; run++) {
    times.bare.push(Number(await output([program, `${group}`, device])) / 1e6);
    times.daemon.push(await daemonOnce());
  }
  return { bare: times.bare.slice(WARM_UP), daemon: times.daemon.slice(WARM_UP) };
}
