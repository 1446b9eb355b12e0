import { runProgram } from "../../../src/command-line.ts";
import { runDaemon } from "../../../src/daemon/main.ts";

/**
 * vfe-vhostd, but for one thing: it takes the next connection at once after a session that ended badly. Else a VF waits
 * longer after each, up to seconds, and a front-end that does nothing but misbehave would hardly be heard.
 */
await runProgram(() => runDaemon(process.argv.slice(2), { longestBackoff: 0 }));
