import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { Deadline } from "../../src/base/deadline.ts";
import { BackendRequest, ProtocolFeature, Request } from "../../src/vhost-user/messages.ts";
import { featureBits } from "../../src/virtio/features.ts";
import { FrontendListener } from "../kit/frontend/frontend.ts";
import { MOVERS } from "../kit/movers.ts";
import type { NetFrontend } from "../kit/net/net-frontend.ts";
import type { NetGuest } from "../kit/net/net-guest.ts";
import { NetLab } from "../kit/net/net-lab.ts";
import { connectFromElsewhere } from "../kit/net/other-process.ts";
import { RegistryLab } from "../kit/registry-lab.ts";

/** What a guest, its VMM and the operator are told of a link that is lost and comes back. */

const PATIENCE = 10_000;
/** As QEMU's network front-end, which cannot be told of changes. */
const DEAF = { protocolFeatures: ~featureBits(ProtocolFeature.CONFIG) };

/** Offset of `status` in the configuration space. */
const linkIsUp = async (frontend: NetFrontend) => ((await frontend.getConfig(6, 2))![0]! & 1) === 1;

/** Waits until the front-end has been told of so many changes more, and has the link as it should be. */
async function told({ frontend }: NetGuest, before: number, up: boolean): Promise<void> {
  await Deadline.after(PATIENCE, `link ${up ? "up" : "down"}`).poll(async () => {
    return (changes(frontend) > before && (await linkIsUp(frontend)) === up) || undefined;
  }, 2);
}

const changes = ({ backendRequests }: NetFrontend) =>
  backendRequests!.received.filter(({ request }) => request === BackendRequest.CONFIG_CHANGE_MSG).length;

describe.each(MOVERS)("moved by $mover", ({ mover, migration }) => {
  let lab: NetLab;
  beforeAll(async () => {
    lab = await NetLab.create({ migration, pairs: 1 });
  }, 30_000);
  afterAll(async () => {
    await lab?.[Symbol.asyncDispose]();
  });

  test("a front-end with CONFIG is told, whether an operator or the other end is the cause", async () => {
    await lab.idle(0, 1);
    using here = await lab.boot(0);
    expect(await linkIsUp(here.frontend)).toBe(false);
    {
      const before = changes(here.frontend);
      using there = await lab.boot(1);
      await told(here, before, true);
      for (const link of [false, true]) {
        const before = changes(here.frontend);
        await lab.set(0, { link });
        await told(here, before, link);
        expect(lab.info(0).state).toBe("running");
      }
      const stream = there.stream(0, here);
      await stream.progress(20);
      await stream.stop();
    }
    // The other front-end was killed.
    await told(here, 0, false);
    const before = changes(here.frontend);
    using again = await lab.boot(1);
    await told(here, before, true);
    const stream = again.stream(0, here);
    await stream.progress(20);
    expect((await stream.stop()).lost).toBe(0);
    await here.checkBuffers();
  }, 30_000);

  test("a front-end without CONFIG is told by a hang-up where it can come back, and is not where it cannot", async () => {
    await lab.idle(0, 1);
    using there = await lab.boot(1);
    using here = await lab.boot(0, DEAF);
    const stream = there.stream(0, here);
    await stream.progress(20);
    const { vf } = lab.daemon;
    const socket = lab.daemon.socket(`${vf}.sock`);
    const log = lab.daemon.socket("another-vmm.log");
    await lab.set(0, { link: false });
    if (mover === "registers") {
      const said = () => lab.info(0).reason?.includes("link is down") || undefined;
      await Deadline.after(PATIENCE, "the reason").poll(said, 2);
      expect(lab.info(0)).toMatchObject({ connected: true, state: "running" });
      await lab.set(0, { link: true });
      await stream.progress(20);
      expect(lab.info(0).reason).toBeNull();
      return;
    }
    await here.frontend.hungUp();
    await lab.idle(0);
    expect(lab.info(0).reason).toContain("the link is down");
    // The same VMM is turned away, one of another guest is not.
    await here.reconnect(
      () => lab.dial(0, DEAF),
      async () => {
        using early = lab.dial(0);
        await early.hungUp();
        expect(await connectFromElsewhere(socket, log)).toBe("served");
        await lab.idle(0);
        using stillEarly = lab.dial(0);
        await stillEarly.hungUp();
        await lab.set(0, { link: true });
        await Deadline.after(PATIENCE, "the link").poll(() => lab.info(0).reason === null || undefined, 2);
      },
    );
    await lab.daemon.running();
    await stream.progress(50);
    expect((await stream.stop()).reordered).toBe(0);
    await here.checkBuffers();
  }, 30_000);

  test("a link that goes down while its guest is stopped is shown to it when it goes on", async () => {
    await lab.idle(0, 1);
    using there = await lab.boot(1);
    using here = await lab.boot(0, DEAF);
    const stream = there.stream(0, here);
    await stream.progress(20);
    await stream.stop();
    const { frontend } = here;
    const bases = await frontend.stop({ order: "new" });
    await lab.set(0, { link: false });
    const reason = (wanted: string) =>
      Deadline.after(PATIENCE, wanted).poll(() => lab.info(0).reason?.includes(wanted) || undefined, 2);
    await reason("the link is down");
    expect(lab.info(0).connected).toBe(true);
    // It may be hung up on in the middle of it.
    await frontend.resumeQueues(bases).catch(() => {});
    await reason(mover === "registers" ? "does not see it" : "turned away");
    if (mover === "vendor") await lab.idle(0);
    expect(lab.info(0).connected).toBe(mover === "registers");
    await lab.set(0, { link: true });
    await Deadline.after(PATIENCE, "the link").poll(() => lab.info(0).reason === null || undefined, 2);
  }, 30_000);

  test("a link that an operator takes down and up again while nobody is there is nobody's matter", async () => {
    await lab.idle(0, 1);
    await lab.set(0, { link: false });
    using frontend = lab.dial(0, DEAF);
    expect(await frontend.askU64(Request.GET_FEATURES)).toBeGreaterThan(0n);
    await lab.set(0, { link: true });
  }, 30_000);
});

test("a daemon that connects to its VMM is connected and gone, again and again, while the link is down", async () => {
  const softvf = ["--backend", "echo"];
  await using lab = await RegistryLab.create({ className: "net", vfs: 1, softvf });
  await lab.registry.addPf(lab.pf);
  const path = lab.socket("vmm.sock");
  using listener = new FrontendListener(path);
  await lab.registry.addVf({ address: lab.vf, socket: path, mode: "client" });
  const start = async () => {
    using undo = new DisposableStack();
    const frontend = undo.use(await listener.accept());
    await frontend.negotiate(DEAF);
    await frontend.setupMemory([{ gpa: 2 ** 32, size: 4 << 20 }]);
    await frontend.startQueues(2);
    undo.move();
    return frontend;
  };
  using first = await start();
  await lab.set(lab.vf, { link: false });
  await first.hungUp();
  for (let times = 0; times < 2; times++) {
    using refused = await listener.accept();
    await refused.hungUp();
  }
  await lab.set(lab.vf, { link: true });
  // One more may have been on its way.
  using _second = await start().catch(start);
  expect(lab.registry.vfInfo(lab.vf)).toMatchObject({ state: "running", reason: null });
}, 30_000);
