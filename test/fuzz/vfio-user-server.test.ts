import { expect, test } from "bun:test";
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { Deadline } from "../../src/base/deadline.ts";
import { VhostdError } from "../../src/base/errors.ts";
import { liveFds } from "../../src/native/fd.ts";
import { MessageSocket } from "../../src/native/message-socket.ts";
import { connectUnix } from "../../src/native/sys.ts";
import { parsePciAddress } from "../../src/pci/address.ts";
import { vfioUserFraming } from "../../src/vfio-user/framing.ts";
import { HEADER, HeaderFlag } from "../../src/vfio-user/messages.ts";
import { FdPool } from "../kit/fuzz/fd-pool.ts";
import { holdings } from "../kit/fuzz/holdings.ts";
import { type ClientMessage, hostileClient } from "../kit/fuzz/vfio-user.ts";
import { FUZZ_TIMEOUT, fuzz } from "../kit/fuzz.ts";
import { Child } from "../kit/guest/child.ts";
import { BackgroundIo, VerifiedDisk } from "../kit/verified-disk.ts";
import { type Reachable, TestDriver } from "../loopback/softvf-driver.ts";

const soon = (what: string) => Deadline.after(10_000, what);
/** Of guest memory, see FdPool. */
const contents = fc.oneof(fc.constant(0), fc.nat());
const PF = "0000:5a:00.0";

/** Sends all, takes what is answered, and hangs up when everything was answered or the server did. */
async function speak(path: string, messages: readonly ClientMessage[], pool: FdPool): Promise<void> {
  using socket = new MessageSocket(connectUnix(path), vfioUserFraming({ maxBody: 1 << 21, maxFds: 253 }));
  const expected = messages.filter(({ flags }) => (flags & HeaderFlag.noReply) === 0).length;
  const answers = (async () => {
    for (let seen = 0; seen < expected; seen++) {
      using answer = await socket.receive();
      if (answer === undefined) return;
      const { flags } = HEADER.read(answer.header);
      // The server asks for nothing itself.
      if (answer.header.length > 0) expect(flags & HeaderFlag.typeMask).toBe(HeaderFlag.reply);
    }
  })();
  try {
    for (const [id, { command, flags, size, body, fds }] of messages.entries()) {
      const header = HEADER.encode({ id, command, size: Math.max(0, HEADER.size + body.length + size), flags });
      const bytes = new Uint8Array(Buffer.concat([header, body]));
      await socket.send(
        bytes,
        fds.map((kind) => pool.number(kind)),
      );
      // Behind a size that is a lie the server may wait for the rest.
      if (size !== 0) break;
    }
    if (messages.every(({ size }) => size === 0)) await soon("answers or the hang-up of the server").race(answers);
  } catch (error) {
    if (!(error instanceof VhostdError) || error.code === "timedOut") throw error;
  } finally {
    socket[Symbol.dispose]();
    await answers.catch((error) => {
      if (!(error instanceof VhostdError)) throw error;
    });
  }
}

/** A driver that behaves is served. Whoever was there before may still be on its way out. */
async function behave(served: Reachable): Promise<void> {
  const driver = await soon("a connection to the function").poll(
    () => TestDriver.start(served).catch((error) => (error instanceof VhostdError ? undefined : Promise.reject(error))),
    5,
  );
  try {
    await soon("requests of a driver that behaves").race(new VerifiedDisk(0, 16).steps(driver.queues[0]!, 4));
  } finally {
    await driver[Symbol.asyncDispose]();
  }
}

class Softvf implements AsyncDisposable {
  private constructor(
    private readonly directory: string,
    readonly process: Child,
  ) {}

  static async start(): Promise<Softvf> {
    const directory = mkdtempSync(join(tmpdir(), "softvf-"));
    for (const vf of [0, 1]) {
      writeFileSync(join(directory, `disk${vf}`), "");
      truncateSync(join(directory, `disk${vf}`), 1 << 20);
    }
    const command = [process.execPath, join(import.meta.dir, "../../bin/vfe-softvf.ts")];
    const words = [
      ...["--pf", PF, "--class", "blk", "--vfs", "2", "--queues", "4", "--log-level", "error"],
      ...["--disk", join(directory, "disk{vf}"), "--runtime-dir", join(directory, "run")],
    ];
    const child = new Child([...command, ...words], { name: "vfe-softvf", log: join(directory, "log") });
    await child.line(/^ready /m, 15_000);
    return new Softvf(directory, child);
  }

  vf(address: string): Reachable {
    const path = join(this.directory, `run/devices/${address}/vfio-user.sock`);
    return { address: parsePciAddress(address), server: { path } };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.process[Symbol.asyncDispose]();
    rmSync(this.directory, { recursive: true });
  }
}

test(
  "whatever a client sends to vfe-softvf, the function is free afterwards, and another one works all the while",
  async () => {
    const ownFds = liveFds();
    {
      await using softvf = await Softvf.start();
      const { pid } = softvf.process;
      const victim = softvf.vf("0000:5a:00.1");
      await using neighbour = await TestDriver.start(softvf.vf("0000:5a:00.2"));
      const disk = new VerifiedDisk(0, 64);
      const io = new BackgroundIo(async () => {
        await disk.step(neighbour.queues[0]!);
        await Bun.sleep(1);
      });
      using pool = new FdPool();
      await behave(victim);
      const before = await holdings(pid, soon("a steady number of files"));
      let seen = 0;
      const property = fc.asyncProperty(hostileClient, contents, async (messages, nonsense) => {
        pool.fill(nonsense);
        await speak(victim.server.path, messages, pool);
      });
      const between = async () => {
        await behave(victim);
        await soon("I/O of the other function").poll(() => io.done > seen || undefined, 1);
        seen = io.done;
      };
      await fuzz("vfio-user server", property, { batch: 20, between });
      await io.stop();
      expect(await holdings(pid, soon("a steady number of files"))).toEqual(before);
      expect(softvf.process.log).not.toMatch(/unhandled|unexpected|TypeError|RangeError/i);
    }
    await soon("own files").poll(() => liveFds() === ownFds || undefined, 10);
  },
  FUZZ_TIMEOUT,
);
