import { join } from "node:path";
import { Child } from "../guest/child.ts";

/** What a back-end does with a front-end of another process. */
export type Welcome = "served" | "refused";

/** Connects to a back-end from a process of its own, as another VMM. @param log where it writes what it saw */
export async function connectFromElsewhere(socket: string, log: string): Promise<Welcome> {
  await using child = new Child([process.execPath, join(import.meta.dir, "ask-features.ts"), socket], {
    name: "another VMM",
    log,
  });
  const [, answer] = await child.line(/^(served|refused)$/m, 10_000);
  await child.exited;
  return answer as Welcome;
}
