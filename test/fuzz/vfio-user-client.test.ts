import { expect, test } from "bun:test";
import fc from "fast-check";
import { Deadline } from "../../src/base/deadline.ts";
import { VhostdError } from "../../src/base/errors.ts";
import { liveFds } from "../../src/native/fd.ts";
import { eventfd, memfd, socketPair } from "../../src/native/sys.ts";
import { parsePciAddress } from "../../src/pci/address.ts";
import { VfioUserClient } from "../../src/pci/vfio-user/client.ts";
import { VfioUserFunction } from "../../src/pci/vfio-user/function.ts";
import { Command } from "../../src/vfio-user/messages.ts";
import { FdPool } from "../kit/fuzz/fd-pool.ts";
import { type Lie, lie } from "../kit/fuzz/vfio-user.ts";
import { FUZZ_TIMEOUT, fuzz } from "../kit/fuzz.ts";
import { type Answer, type Request, ScriptedServer } from "../unit/vfio-user/scripted-server.ts";

const ADDRESS = parsePciAddress("0000:5a:00.1");
/** Milliseconds that a client waits for answers where it is told how long. */
const PATIENCE = 20;
/** For what must come to an end by itself; a busy machine is slow. */
const soon = (what: string) => Deadline.after(10_000, what);

/** Lies to each command in turn; those beyond the list are answered sanely. */
class LyingServer extends ScriptedServer {
  private readonly left: Lie[];

  constructor(
    fd: ConstructorParameters<typeof ScriptedServer>[0],
    private readonly pool: FdPool,
    lies: readonly Lie[],
  ) {
    super(fd);
    this.left = [...lies];
    for (const command of Object.values(Command)) this.script.set(command, (request) => this.lie(request));
  }

  private async lie(request: Request): Promise<Answer> {
    const how = this.left.shift() ?? { kind: "usual" };
    switch (how.kind) {
      case "errno":
        return { errno: how.errno };
      case "silent":
        return { silent: true };
      case "hangUp":
        this[Symbol.dispose]();
        return { silent: true };
      case "body":
        return { body: how.body, fds: how.fds.map((kind) => this.pool.number(kind)) };
      case "change":
        return this.changed(request, how);
      case "cut":
        return { ...this.sane(request), body: (this.sane(request).body ?? new Uint8Array(0)).slice(0, how.length) };
      case "header":
        return { ...this.sane(request), header: how.header };
      case "raw":
        await this.send(how.bytes);
        return { silent: true };
      default:
        return this.sane(request);
    }
  }

  private changed(request: Request, { at, value, fds }: Lie & { kind: "change" }): Answer {
    const answer = this.sane(request);
    const body = (answer.body ?? new Uint8Array(8)).slice();
    if (body.length >= 8) new DataView(body.buffer).setBigUint64((4 * at) % (body.length - 7), value, true);
    return { ...answer, body, fds: fds.length > 0 ? fds.map((kind) => this.pool.number(kind)) : (answer.fds ?? []) };
  }

  /** Of a request of ours; those are sane. */
  private sane(request: Request): Answer {
    return this.usual(request);
  }
}

/** Ends well, or with an error of ours that says something. */
async function settled(operation: Promise<unknown>, what: string): Promise<void> {
  try {
    await soon(what).race(operation);
  } catch (error) {
    if (!(error instanceof VhostdError)) throw error;
    expect(error.message).not.toBe("");
    expect(error.message).not.toStartWith(what);
  }
}

const operation = fc.constantFrom(
  "readConfig",
  "readBytes",
  "writeRegister",
  "map",
  "unmap",
  "route",
  "doorbell",
  "kick",
  "reset",
);

/** A driver's use of the function. The server ends where it does not answer: most of these wait for seconds else. */
async function use(fn: VfioUserFunction, what: string): Promise<unknown> {
  using file = memfd("range", 4096);
  using event = eventfd();
  const deadline = Deadline.after(PATIENCE, what);
  const range = { iova: 0x10000, size: 4096, offset: 0, file: { dev: 0, ino: 0 } };
  switch (what) {
    case "readConfig":
      return await fn.config.read(0, 4);
    case "readBytes":
      return await fn.region(4).readBytes(0, 100);
    case "writeRegister":
      return await fn.region(4).write(0x14, 1, 0xf);
    case "map":
      return await fn.dmaMap(range, file.number, deadline);
    case "unmap":
      return await fn.dmaUnmap(range, deadline);
    case "route":
      return await fn.interrupts.route(0, event.number);
    case "doorbell":
      return await fn.doorbell(4, 0x3000).ring(0);
    case "kick":
      return await fn.doorbell(4, 0x3000).takeKick?.(event.number);
    default:
      return await fn.reset(deadline);
  }
}

test(
  "whatever a server answers, each request ends, and no descriptor is kept",
  async () => {
    const lies = fc.array(lie, { minLength: 1, maxLength: 40 });
    const property = fc.asyncProperty(lies, fc.array(operation, { maxLength: 12 }), async (all, operations) => {
      const before = liveFds();
      {
        using pool = new FdPool();
        const [near, far] = socketPair();
        using server = new LyingServer(far, pool, all);
        const deadline = Deadline.after(PATIENCE, "the connection");
        const opening = (async () => {
          const client = await VfioUserClient.over(near, "the server", deadline);
          return await VfioUserFunction.over(ADDRESS, client, deadline);
        })();
        await settled(opening, "the end of the attempt to connect");
        const fn = await opening.catch(() => undefined);
        if (fn !== undefined) {
          await using _ = fn;
          const used = operations.map((what) => settled(use(fn, what), `the end of ${what}`));
          const done = Promise.all(used).then(() => true);
          if (!(await Promise.race([done, Bun.sleep(2 * PATIENCE).then(() => false)]))) server[Symbol.dispose]();
          await done;
        }
      }
      await soon("closing of what was received").poll(() => liveFds() === before || undefined, 1);
    });
    await fuzz("vfio-user client", property, { batch: 20 });
  },
  FUZZ_TIMEOUT,
);
