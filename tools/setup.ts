import type { ProfileName } from "../test/vfio/profiles.ts";
import { defineTask } from "./command.ts";
import { bringMachine } from "./machine-tier.ts";
import { prepare } from "./preparation.ts";

export default defineTask({
  name: "setup",
  description:
    "Install and build what is missing: Debian packages, native/, what tests start: guest, Debian, the VM with an IOMMU",
  run: async () => {
    await prepare("native", "guest", "debian");
    const missing = await missingMachines(bringMachine);
    if (missing.length === 0) console.log("setup: everything is in place");
    else for (const reason of missing) console.log(`setup: no VM with an IOMMU, its tests will be skipped: ${reason}`);
    return 0;
  },
});

/** Brings the machines. Without one there is less to test. @returns which cannot be had, and why */
export async function missingMachines(bring: (profile: ProfileName) => Promise<void>): Promise<string[]> {
  const missing: string[] = [];
  for (const profile of ["newest", "oldest"] as const) {
    await bring(profile).catch((error: Error) => missing.push(`${profile}: ${error.message}`));
  }
  return missing;
}
