import { expect, test } from "bun:test";
import { mkdtemp, rm } from "node:fs/promises";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { checkDaemon } from "../../../src/cli/doctor-daemon.ts";
import { Machine } from "../../../src/machine/machine.ts";

const ANSWERS: Readonly<Record<string, object>> = {
  version: { "vfe-vhostd version": "1.2.3" },
  stats: { protected: true },
  "pf.list": { pfs: [{ pf: "0000:0a:00.0", admin_queue: "dead", reason: "no answer" }] },
  "vf.list": {
    vfs: [
      { vf: "0000:0a:00.1", state: "failed", reason: "it was unplugged", socket_file: "/tmp/a", vm_uuid: "" },
      { vf: "0000:0a:00.2", state: "idle", reason: "memory is not shared", socket_file: "/tmp/b", vm_uuid: "" },
      { vf: "0000:0a:00.3", state: "running", reason: null, socket_file: "/tmp/c", vm_uuid: "" },
    ],
  },
};

test("the doctor tells of a daemon that is away, and of what one that answers has lost", async () => {
  const directory = await mkdtemp(join(tmpdir(), "doctor-"));
  const place = { socket: join(directory, "rpc.sock"), timeout: 5000 };
  const server = createServer((socket) =>
    socket.on("data", (data) => {
      const { id, method } = JSON.parse(data.toString()) as { id: number; method: string };
      socket.write(`${JSON.stringify({ jsonrpc: "2.0", id, result: ANSWERS[method] })}\n`);
    }),
  );
  try {
    const machine = new Machine(directory);
    expect(await checkDaemon(machine, place)).toMatchObject([
      { level: "bad", check: "daemon", fix: expect.stringMatching(/^start vfe-vhostd as root .* where it has a unit/) },
    ]);
    await new Promise<void>((resolve) => server.listen(place.socket, resolve));
    expect(await checkDaemon(machine, place)).toMatchObject([
      { level: "ok", check: "daemon", seen: "1.2.3, 1 PFs, 3 VFs; a restart goes unnoticed" },
      { level: "bad", check: "PF 0000:0a:00.0", seen: "its admin queue is dead: no answer" },
      { level: "bad", check: "VF 0000:0a:00.1", seen: "it was unplugged" },
      { level: "warn", check: "VF 0000:0a:00.2", seen: "memory is not shared" },
    ]);
  } finally {
    server.close();
    await rm(directory, { recursive: true });
  }
});
