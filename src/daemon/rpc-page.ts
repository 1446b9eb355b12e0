import { silentLogger } from "../base/log.ts";
import { describeMethods } from "../rpc/discover.ts";
import { SERVER_LIMITS } from "../rpc/server.ts";
import { REQUEST_LIMITS } from "../rpc/splitter.ts";
import { createMethods, type Devices } from "./methods.ts";

const INTRODUCTION = `# Control interface

<!-- Made from the schemas of the methods by \`bun src/daemon/rpc-page.ts > docs/rpc.md\`. -->

JSON-RPC 2.0 on the unix socket \`rpc.sock\` of the daemon's runtime directory (\`/run/vfe-vhostd/rpc.sock\`; owner and
group may use it). Objects follow one another without framing, in either direction; each answer ends with a newline.
Parameters are passed by name. Requests of one connection are carried out in their order; connections do not wait for one
another. A request without \`id\` gets no answer. Batches are not served.

\`\`\`
vfe-vhost-cli call vf.list '{"pf":"0000:5a:00.0"}'
vfe-vhost-cli call stats '{"device":"0000:5a:00.1"}'
vfe-vhost-cli events
\`\`\`

Over TCP the same is served only where \`rpc-tcp\` (\`--rpc-tcp 127.0.0.1:12190\`) says so, on loopback addresses only: any
local user can drive the daemon through it.

## Errors

| Code | Meaning |
|---|---|
| -32700 | the message is not JSON, too long, nested too deep or never completed |
| -32600 | not a JSON-RPC 2.0 request, or a batch |
| -32601 | no such method |
| -32602 | a parameter is missing, unknown or of a wrong type; \`data\` has \`parameter\` and \`expected\` |
| -32603 | a defect of the daemon; its log has more |
| others | the negated number of the error; \`data\` has \`reason\` (a word), and \`fix\` (a sentence) where there is one |

Limits: ${REQUEST_LIMITS.size} bytes and ${REQUEST_LIMITS.depth} levels a message, ${SERVER_LIMITS.partialTimeout / 1000} s for a message to be complete,
${SERVER_LIMITS.sendTimeout / 1000} s for a client to read its answers, ${SERVER_LIMITS.unsent} bytes of events that wait for it, ${SERVER_LIMITS.clients} connections.

`;

const noDevices: Devices = {
  addPf: () => Promise.reject(new Error("no devices")),
  removePf: () => Promise.reject(new Error("no devices")),
  listPfs: () => [],
  addVf: () => Promise.reject(new Error("no devices")),
  removeVf: () => Promise.reject(new Error("no devices")),
  listVfs: () => [],
  listLeftVfs: () => [],
  vfInfo() {
    throw new Error("no devices");
  },
  vfStats: () => Promise.reject(new Error("no devices")),
  moveVf: () => Promise.reject(new Error("no devices")),
  logVf: () => Promise.reject(new Error("no devices")),
  onEvent: () => ({ [Symbol.dispose]() {} }),
};

/** docs/rpc.md. */
export function rpcPage(): string {
  return `${INTRODUCTION}${describeMethods(createMethods(noDevices, silentLogger)).trimEnd()}\n`;
}

if (import.meta.main) process.stdout.write(rpcPage());
