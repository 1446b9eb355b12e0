import { expect, test } from "bun:test";
import { mkdirSync, mkdtempSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { Deadline } from "../../src/base/deadline.ts";
import { liveFds } from "../../src/native/fd.ts";
import { connectUnix } from "../../src/native/sys.ts";
import { RpcClient } from "../../src/rpc/client.ts";
import { VhostUserFrontend } from "../kit/frontend/frontend.ts";
import { FdPool } from "../kit/fuzz/fd-pool.ts";
import { type Holdings, holdings, residentSize } from "../kit/fuzz/holdings.ts";
import { runHostileFrontend } from "../kit/fuzz/hostile-frontend.ts";
import { fuzzedSessions, type Offered } from "../kit/fuzz/vhost-user.ts";
import { FUZZ_TIMEOUT, fuzz, LONG_RUN, SEED } from "../kit/fuzz.ts";
import { Child } from "../kit/guest/child.ts";
import { BackgroundIo, VerifiedDisk } from "../kit/verified-disk.ts";

/** One VF of a daemon is shouted at, another one of it works: the daemon and vfe-softvf are processes of their own. */

const MESSAGES = 1_000_000;
/** Milliseconds that an ordinary test run takes for as many of them as fit; `./dev fuzz` sends all, and more. */
const SHORT = 40_000;
const PF = "0000:5a:00.0";
const VICTIM = "0000:5a:00.1";
const NEIGHBOUR = "0000:5a:00.2";
const DISK_SIZE = 8 << 20;
const QUEUES = 4;
const PATIENCE = 20_000;
/** Sessions between two looks at the neighbour. */
const BATCH = 25;
/** Messages until caches and heaps have the size that they keep. */
const WARM_UP = 50_000;
/** What a heap may be larger than after the warm-up, bytes: 33 for each message of a whole run. */
const GROWTH = 32 << 20;
/** Milliseconds between two requests of the neighbour. */
const PACE = 2;

/** Of guest memory, see FdPool. */
const contents = fc.oneof(fc.constant(0), fc.nat());

const ROOT = join(import.meta.dir, "../..");

class Stand implements AsyncDisposable {
  readonly victim: string;
  readonly neighbour: string;

  private constructor(
    private readonly directory: string,
    readonly softvf: Child,
    readonly daemon: Child,
  ) {
    this.victim = join(directory, "victim.sock");
    this.neighbour = join(directory, "neighbour.sock");
  }

  static async start(): Promise<Stand> {
    const directory = mkdtempSync(join(tmpdir(), "fuzz-"));
    for (const name of ["disk-0", "disk-1"]) {
      writeFileSync(join(directory, name), "");
      truncateSync(join(directory, name), DISK_SIZE);
    }
    mkdirSync(join(directory, "run"));
    const run = (name: string, program: string, words: readonly string[]) =>
      new Child([process.execPath, join(ROOT, program), ...words], { name, log: join(directory, `${name}.log`) });
    const softvf = run("softvf", "bin/vfe-softvf.ts", [
      ...["--pf", PF, "--class", "blk", "--vfs", "2", "--queues", `${QUEUES}`, "--log-level", "error"],
      ...["--disk", join(directory, "disk-{vf}"), "--runtime-dir", join(directory, "softvf")],
    ]);
    await softvf.line(/^ready /m, PATIENCE);
    const daemon = run("vhostd", "test/kit/fuzz/impatient-daemon.ts", [
      ...["--runtime-dir", join(directory, "run"), "--bus", join(directory, "softvf/devices"), "--log-level", "error"],
    ]);
    await daemon.line(/^ready /m, PATIENCE);
    const stand = new Stand(directory, softvf, daemon);
    await stand.call("pf.add", { device: PF });
    await stand.call("vf.add", { device: VICTIM, socket: stand.victim, mode: "server" });
    await stand.call("vf.add", { device: NEIGHBOUR, socket: stand.neighbour, mode: "server" });
    return stand;
  }

  async call(method: string, params: Readonly<Record<string, unknown>>): Promise<unknown> {
    const deadline = Deadline.after(PATIENCE, method);
    using client = await RpcClient.connect(join(this.directory, "run/rpc.sock"), deadline);
    return await client.call(method, params, deadline);
  }

  /** A front-end of the victim that behaves: what it is offered, and that it is served. */
  async behave(): Promise<Offered> {
    using frontend = VhostUserFrontend.connect(this.victim);
    await startDisk(frontend);
    await new VerifiedDisk().steps(frontend.queues[0]!.driver, 20);
    return { features: frontend.features, protocolFeatures: frontend.protocolFeatures, queues: QUEUES };
  }

  /** What both processes hold while the victim has no front-end. */
  async held(): Promise<readonly Holdings[]> {
    await Deadline.after(PATIENCE, "the victim's last session").poll(async () => {
      const info = (await this.call("vf.info", { device: VICTIM })) as { state: string; connected: boolean };
      return (info.state === "idle" && !info.connected) || undefined;
    }, 10);
    const deadline = Deadline.after(PATIENCE, "a steady number of files and mappings");
    return [await holdings(this.daemon.pid, deadline), await holdings(this.softvf.pid, deadline)];
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.daemon[Symbol.asyncDispose]();
    await this.softvf[Symbol.asyncDispose]();
    rmSync(this.directory, { recursive: true });
  }
}

async function startDisk(frontend: VhostUserFrontend): Promise<void> {
  await frontend.negotiate();
  await frontend.setupMemory([{ gpa: 0, size: 4 << 20 }]);
  await frontend.startQueues(1, { size: 64 });
}

test(
  "whatever one front-end sends to the daemon, nothing leaks and another VF is served all the while",
  async () => {
    const ownFds = liveFds();
    {
      await using stand = await Stand.start();
      using pool = new FdPool();
      using neighbour = VhostUserFrontend.connect(stand.neighbour);
      await startDisk(neighbour);
      const disk = new VerifiedDisk();
      const io = new BackgroundIo(async () => {
        await disk.step(neighbour.queues[0]!.driver);
        await Bun.sleep(PACE);
      });
      const offered = await stand.behave();
      const before = await stand.held();
      const processes = [stand.daemon, stand.softvf];
      const warm = new Map<Child, number>();

      let handled = 0;
      let seen = 0;
      const started = performance.now();
      const sessions = fuzzedSessions(offered, { oneBadOf: 300, length: 1000, running: 5 });
      const property = fc.asyncProperty(sessions, contents, async (session, nonsense) => {
        pool.fill(nonsense);
        pool.cut(false);
        const running = runHostileFrontend(connectUnix(stand.victim), session, pool);
        if (nonsense !== 0) pool.cut(true);
        handled += await running;
      });
      const between = async () => {
        for (const child of processes) if (!child.running) throw new Error(`${child.name} ended:\n${child.tail()}`);
        if (warm.size === 0 && handled >= WARM_UP) {
          for (const child of processes) warm.set(child, residentSize(child.pid));
        }
        await Deadline.after(PATIENCE, "I/O of the other VF").poll(() => io.done > seen || undefined, 1);
        seen = io.done;
      };
      const enough = () => {
        if (warm.size === 0) return false;
        const elapsed = performance.now() - started;
        if (LONG_RUN !== undefined) return handled >= MESSAGES && elapsed >= LONG_RUN;
        return handled >= MESSAGES || elapsed >= SHORT;
      };
      await fuzz("vhost-user session of a daemon", property, { batch: BATCH, between, enough });

      console.log(`${handled} messages, ${seen} requests of the other VF, seed ${SEED}`);
      expect(await io.stop()).toBeGreaterThan(0);
      expect(await stand.held()).toEqual(before);
      for (const [child, size] of warm) expect(residentSize(child.pid) - size).toBeLessThan(GROWTH);
      // The victim itself is as good as new.
      await stand.behave();
      expect(await stand.held()).toEqual(before);
      expect(stand.daemon.log + stand.softvf.log).not.toMatch(/unhandled|unexpected|TypeError|RangeError/i);
    }
    await Deadline.after(5000, "own files").poll(() => liveFds() === ownFds || undefined, 10);
  },
  FUZZ_TIMEOUT + 600_000,
);
