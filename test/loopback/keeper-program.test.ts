import { expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { KeeperClient } from "../../src/keeper/keeper-client.ts";
import { drainEventfd, eventfd, signalEventfd } from "../../src/native/sys.ts";
import { keeperSocket } from "../../src/runtime-directory.ts";
import { Child } from "../kit/guest/child.ts";
import { rejection } from "../kit/rejection.ts";

/** vfe-vhostd-ha as a process. */

const ROOT = join(import.meta.dir, "../..");
const soon = () => Deadline.after(10_000, "the keeper");

class Keeper implements AsyncDisposable {
  private constructor(
    readonly directory: string,
    readonly program: Child,
    private readonly stack: AsyncDisposableStack,
  ) {}

  /** @param files that it may have open */
  static async start(files?: number): Promise<Keeper> {
    await using undo = new AsyncDisposableStack();
    const directory = await mkdtemp(join(tmpdir(), "keeper-"));
    undo.defer(() => rm(directory, { recursive: true }));
    const program = undo.use(start(directory, join(directory, "run"), "log", files));
    await program.line(/^ready /m, 10_000);
    return new Keeper(directory, program, undo.move());
  }

  get runtime(): string {
    return join(this.directory, "run");
  }

  get socket(): string {
    return keeperSocket(this.runtime);
  }

  connect(): Promise<KeeperClient> {
    return KeeperClient.connect(this.socket, soon());
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stack.disposeAsync();
  }
}

function start(directory: string, runtime: string, log: string, files?: number): Child {
  const limit = files === undefined ? [] : ["bash", "-c", `ulimit -n ${files}; exec "$@"`, "limited"];
  const command = [...limit, process.execPath, join(ROOT, "bin/vhostd-ha.ts"), "--runtime-dir", runtime];
  return new Child(command, { name: "vfe-vhostd-ha", log: join(directory, log) });
}

test("what is stored outlives the process that stored it", async () => {
  await using keeper = await Keeper.start();
  using kept = eventfd();
  const storing = `
    import { KeeperClient } from "${ROOT}/src/keeper/keeper-client.ts";
    import { Deadline } from "${ROOT}/src/base/deadline.ts";
    import { eventfd, signalEventfd } from "${ROOT}/src/native/sys.ts";
    const client = await KeeperClient.connect(process.argv[1], Deadline.after(10_000, "the keeper"));
    const fd = eventfd();
    await client.put("vf/0", () => ({ record: { stored: true }, fds: new Map([["kick", fd.number]]) }));
    signalEventfd(fd.number);
    console.log("stored");
    await new Promise(() => setInterval(() => {}, 1000));
  `;
  await using storer = new Child([process.execPath, "-e", storing, keeper.socket], {
    name: "a daemon",
    log: join(keeper.directory, "storer"),
  });
  await storer.line(/^stored/m, 10_000);
  await storer.kill();
  using client = await keeper.connect();
  expect(await client.list()).toEqual(["vf/0"]);
  const stored = await client.get("vf/0");
  expect(stored?.record).toEqual({ stored: true });
  using kick = stored!.fds.get("kick")!;
  expect(drainEventfd(kick.number)).toBe(1);
  await client.put("vf/0", () => ({ record: null, fds: new Map([["kick", kept.number]]) }));
  signalEventfd(kept.number);
  const again = (await client.get("vf/0"))!.fds.get("kick")!;
  expect(drainEventfd(again.number)).toBe(1);
  again[Symbol.dispose]();
  keeper.program.signal("SIGTERM");
  expect(await soon().race(keeper.program.exited)).toBe(0);
  expect(existsSync(keeper.runtime)).toBe(false);
}, 30_000);

test("another user is refused, and a second keeper in the same directory", async () => {
  await using keeper = await Keeper.start();
  const dial = `
    import { connect } from "node:net";
    const socket = connect(process.argv[1]);
    socket.on("error", () => {});
    socket.on("close", () => console.log("hung up"));
  `;
  // It gets as far as the keeper itself.
  const nobody = ["setpriv", "--reuid=65534", "--inh-caps=+dac_override", "--ambient-caps=+dac_override"];
  await using stranger = new Child([...nobody, process.execPath, "-e", dial, keeper.socket], {
    name: "somebody else",
    log: join(keeper.directory, "stranger"),
  });
  await stranger.line(/^hung up/m, 10_000);
  await keeper.program.line(/a connection was refused: process \d+ is of user 65534/, 10_000);
  await using second = start(keeper.directory, keeper.runtime, "second");
  expect(await soon().race(second.exited)).toBe(1);
  expect(second.log).toMatch(/vfe-vhostd-ha: another keeper runs in/);
  using client = await keeper.connect();
  expect(await client.list()).toEqual([]);
}, 30_000);

test("fds that it has no room for are refused, and the connection stays", async () => {
  await using keeper = await Keeper.start(7000);
  using client = await keeper.connect();
  using fd = eventfd();
  const fds = new Map(Array.from({ length: 1000 }, (_, index) => [`${index}`, fd.number]));
  await client.put("vf/0", () => ({ record: 0, fds }));
  expect(await rejection(client.put("vf/1", () => ({ record: 1, fds })))).toMatchObject({
    code: "keeperStore",
    message: expect.stringMatching(/^fds of all records with vf\/1: 2000, at most 1368$/),
  });
  expect(await client.list()).toEqual(["vf/0"]);
}, 30_000);
