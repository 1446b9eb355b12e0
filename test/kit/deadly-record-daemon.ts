import { runDaemon } from "../../src/daemon/main.ts";
import { Vf } from "../../src/daemon/vf.ts";
import { DmaDomain } from "../../src/pci/dma-domain.ts";
import type { PciFunction } from "../../src/pci/function.ts";

/**
 * The daemon, of which the record of one VF (VFE_DEADLY_VF) is the death: at its start, at the stage VFE_DEADLY_STAGE ("open",
 * "take up"). At the stage "hang" it lives, and the VF is never taken up.
 */

const vf = process.env["VFE_DEADLY_VF"];
const stage = process.env["VFE_DEADLY_STAGE"];

function die(): never {
  process.kill(process.pid, "SIGKILL");
  throw new Error("this process is dead");
}

const { revive } = Vf;
Vf.revive = async (...values) => {
  const isDeadly = values[0].entry.address === vf;
  if (stage === "take up" && isDeadly) die();
  if (stage === "hang" && isDeadly) await new Promise(() => {});
  return await revive(...values);
};
const { reviveFunction } = DmaDomain.prototype;
DmaDomain.prototype.reviveFunction = function (this: DmaDomain, ...values): PciFunction {
  if (stage === "open" && values[0].address === vf) die();
  return reviveFunction.apply(this, values);
};

process.exitCode = await runDaemon(process.argv.slice(2));
