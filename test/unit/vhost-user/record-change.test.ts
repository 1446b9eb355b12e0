import { expect, test } from "bun:test";
import { eventfd } from "../../../src/native/sys.ts";
import type { Backend } from "../../../src/vhost-user/backend.ts";
import { Request, U64, VRING_NO_FD } from "../../../src/vhost-user/messages.ts";
import { watchRecord } from "../../../src/vhost-user/record-change.ts";
import { requestTable, rowOf } from "../../../src/vhost-user/requests.ts";
import { Ring } from "../../../src/vhost-user/rings.ts";
import { fakeClass } from "../../kit/fake-class.ts";

const table = requestTable(fakeClass());

function watched(request: number, value: bigint, rings: readonly Ring[]) {
  return watchRecord(rowOf(table, request), U64.encode({ value }), { rings } as Backend);
}

test("an eventfd that comes in the place of another one changes nothing else", () => {
  using ring = new Ring(1, 256);
  using other = new Ring(0, 256);
  const rings = [other, ring];
  for (const [request, which] of [
    [Request.SET_VRING_CALL, "call"],
    [Request.SET_VRING_ERR, "err"],
  ] as const) {
    const set = (value: bigint, there: boolean) => {
      const changed = watched(request, value, rings);
      const fd = there ? eventfd() : undefined;
      ring.swapFd(which, fd)?.[Symbol.dispose]();
      return [changed(), fd?.number];
    };
    // The first, another one, none, none again, and one.
    expect(set(1n, true)[0]).toBe("all");
    const [change, fd] = set(1n, true);
    expect(change).toEqual({ name: `${which}.1`, fd } as never);
    expect(set(1n | VRING_NO_FD, false)[0]).toBe("all");
    expect(set(1n | VRING_NO_FD, false)[0]).toBe("all");
    expect(set(1n, true)[0]).toBe("all");
    // Of a ring that is not there.
    expect(set(7n, true)[0]).toBe("all");
  }
});

test("a kick starts its ring; a question changes nothing", () => {
  using ring = new Ring(0, 256);
  ring.swapFd("kick", eventfd());
  const changed = watched(Request.SET_VRING_KICK, 0n, [ring]);
  ring.swapFd("kick", eventfd())?.[Symbol.dispose]();
  expect(changed()).toBe("all");
  expect(watched(Request.GET_FEATURES, 0n, [ring])()).toBe("nothing");
});
