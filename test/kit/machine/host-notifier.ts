import { Deadline } from "../../../src/base/deadline.ts";
import { Mapping } from "../../../src/native/mmio.ts";
import { BackendRequest, Request, VRING_AREA } from "../../../src/vhost-user/messages.ts";
import type { WireMessage } from "../frontend/channel.ts";
import { u64, type VhostUserFrontend } from "../frontend/frontend.ts";

/** Milliseconds within which a back-end that gives doorbells has given them. */
const GIVEN_TIMEOUT = 20_000;

/** The doorbells that a front-end was given (VHOST_USER_BACKEND_VRING_HOST_NOTIFIER_MSG), oldest first. */
export function givenDoorbells({ backendRequests }: VhostUserFrontend): WireMessage[] {
  return backendRequests?.received.filter(({ request }) => request === BackendRequest.VRING_HOST_NOTIFIER_MSG) ?? [];
}

/**
 * The doorbells of a front-end's queues, mapped as a VMM maps them for its guest: kicks go to the function without a word
 * to anyone. As long as they are mapped the kernel keeps the function open.
 */
export class HostNotifiers implements Disposable {
  private constructor(private readonly pages: ReadonlyMap<number, Mapping>) {}

  /**
   * Waits until every queue of the front-end was given its doorbell, maps them, and lets the driver ring them in place of
   * the kick eventfds.
   * @throws VhostdError timedOut; SystemError where a page cannot be mapped
   */
  static async use(frontend: VhostUserFrontend): Promise<HostNotifiers> {
    const { queues } = frontend;
    const what = `the doorbells of ${queues.length} queues`;
    await Deadline.after(GIVEN_TIMEOUT, what).poll(
      () => givenDoorbells(frontend).length >= queues.length || undefined,
      10,
    );
    using undo = new DisposableStack();
    const pages = new Map<number, Mapping>();
    for (const { payload, fds } of givenDoorbells(frontend).slice(-queues.length)) {
      const { queue, offset, size } = VRING_AREA.read(payload);
      pages.set(Number(queue), undo.use(Mapping.map(fds[0]!.number, offset, size, "read-write")));
    }
    for (const { index, driver } of queues) {
      const page = pages.get(index);
      if (page === undefined) throw new Error(`queue ${index} was given no doorbell of its own`);
      driver.rewire(() => page.write16(0, index));
      // The driver has a new call eventfd with that.
      await frontend.command(Request.SET_VRING_CALL, u64(BigInt(index)), [driver.call.number]);
    }
    undo.move();
    return new HostNotifiers(pages);
  }

  /** The mappings go; the fds that came with the doorbells are the front-end's. */
  [Symbol.dispose](): void {
    for (const page of this.pages.values()) page[Symbol.dispose]();
  }
}
