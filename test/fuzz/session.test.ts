import { expect, test } from "bun:test";
import fc from "fast-check";
import { Deadline } from "../../src/base/deadline.ts";
import { silentLogger } from "../../src/base/log.ts";
import { liveFds, type OwnedFd } from "../../src/native/fd.ts";
import { socketPair } from "../../src/native/sys.ts";
import { ProtocolFeature } from "../../src/vhost-user/messages.ts";
import { Session } from "../../src/vhost-user/session.ts";
import { FeatureBit, featureBits } from "../../src/virtio/features.ts";
import { WireChannel } from "../kit/frontend/channel.ts";
import { FdPool } from "../kit/fuzz/fd-pool.ts";
import { runHostileFrontend } from "../kit/fuzz/hostile-frontend.ts";
import { fuzzedSessions } from "../kit/fuzz/vhost-user.ts";
import { FUZZ_TIMEOUT, fuzz } from "../kit/fuzz.ts";
import { MockTarget } from "../kit/mock-target.ts";

const { MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, RESET_DEVICE, CONFIGURE_MEM_SLOTS, STATUS } = ProtocolFeature;
const { PRESETUP, EXTEND_STATUS } = ProtocolFeature;
/** What MockTarget offers. */
const OFFERED = {
  features: featureBits(
    ...[0, FeatureBit.version1, FeatureBit.ringIndirectDesc, FeatureBit.ringEventIdx, FeatureBit.vhostLogAll],
  ),
  protocolFeatures: featureBits(
    ...[MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, RESET_DEVICE, CONFIGURE_MEM_SLOTS, STATUS],
    ...[PRESETUP, EXTEND_STATUS],
  ),
  queues: 4,
};

/** Messages that change something. */
const LOSES_TRACKING = 25;

/** A whole session with a mock VF; fails where it does not end, or leaves anything behind. */
async function session(talk: (connection: OwnedFd, pool: FdPool) => Promise<unknown>): Promise<void> {
  const before = liveFds();
  {
    using pool = new FdPool();
    const [ours, theirs] = socketPair();
    const target = new MockTarget({ dirtyTracking: true, presetup: true });
    // Now and then it stops to mark what it writes.
    target.onCheckpoint = () => {
      if (target.checkpoints % LOSES_TRACKING === 0) target.loseTracking(new Error("the device has lost its log"));
    };
    const ended = new Session(ours, target, { log: silentLogger }).run();
    await talk(theirs, pool);
    const end = await Deadline.after(10_000, "end of the session").race(ended);
    expect(end.reason).not.toBe("");
    expect(target.mapped).toEqual([]);
    expect(target.running).toBeUndefined();
    expect(target.tracking).toBeUndefined();
  }
  expect(liveFds()).toBe(before);
}

test(
  "whatever a front-end sends, the session ends cleanly",
  async () => {
    const sessions = fuzzedSessions(OFFERED, { oneBadOf: 10, length: 30, running: 30 });
    const property = fc.asyncProperty(sessions, (messages) =>
      session((connection, pool) => runHostileFrontend(connection, messages, pool)),
    );
    await fuzz("vhost-user session", property);
  },
  FUZZ_TIMEOUT,
);

test(
  "bytes that are no messages end the session cleanly",
  async () => {
    const property = fc.asyncProperty(fc.uint8Array({ minLength: 1, maxLength: 600 }), (bytes) =>
      session(async (connection) => {
        using channel = new WireChannel(connection);
        await channel.sendRaw(bytes);
      }),
    );
    await fuzz("vhost-user bytes", property);
  },
  FUZZ_TIMEOUT,
);
