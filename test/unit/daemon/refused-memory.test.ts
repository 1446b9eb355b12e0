import { expect, test } from "bun:test";
import { VhostdError } from "../../../src/base/errors.ts";
import { Request } from "../../../src/vhost-user/messages.ts";
import { VhostUserFrontend } from "../../kit/frontend/frontend.ts";
import { rejection } from "../../kit/rejection.ts";
import { KernelBus, PLAIN } from "./kernel-bus.ts";

/** A guest whose memory the kernel does not take, behind a front-end that was told so and gives up. */

/** Longer than any test; milliseconds. */
const FOREVER = 600_000;
const REASON = expect.stringContaining("cannot be mapped: locked memory is used up; raise LimitMEMLOCK");

async function refuse(bus: KernelBus): Promise<void> {
  bus.refuseMemory = new VhostdError("limitExceeded", "locked memory is used up", { fix: "raise LimitMEMLOCK" });
  using frontend = VhostUserFrontend.connect(bus.socket(PLAIN));
  await frontend.negotiate();
  expect(await frontend.addRegion(frontend.memory.add(0, 8 << 20))).toBe(1n);
  expect(bus.registry.vfInfo(PLAIN)).toMatchObject({ state: "idle", connected: true, reason: REASON });
  bus.refuseMemory = undefined;
}

function ended(bus: KernelBus): Promise<void> {
  return bus.until(() => !bus.registry.vfInfo(PLAIN).connected);
}

test("the VF says why until a guest runs", async () => {
  await using bus = await KernelBus.create({ firstBackoff: 0, longestBackoff: 0 });
  await bus.add(PLAIN);
  await refuse(bus);
  await ended(bus);
  expect(bus.registry.vfInfo(PLAIN)).toMatchObject({
    state: "idle",
    reason: expect.stringMatching(/^the last session ended: guest memory .* raise LimitMEMLOCK$/),
  });
  expect(bus.events.at(-1)).toMatchObject({ vf: PLAIN, state: "idle", reason: REASON });
  {
    using _guest = await bus.guest(PLAIN);
    expect(bus.registry.vfInfo(PLAIN).reason).toBeNull();
  }
  await ended(bus);
  expect(bus.registry.vfInfo(PLAIN).reason).toBeNull();
});

test("the next front-end waits", async () => {
  await using bus = await KernelBus.create({ firstBackoff: FOREVER, longestBackoff: FOREVER });
  await bus.add(PLAIN);
  await refuse(bus);
  await ended(bus);
  using next = VhostUserFrontend.connect(bus.socket(PLAIN));
  expect(await rejection(next.ask(Request.GET_FEATURES))).toMatchObject({ code: "connectionLost" });
});
