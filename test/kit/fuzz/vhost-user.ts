import fc from "fast-check";
import {
  CONFIG,
  FLAG_NEED_REPLY,
  LOG_DESCRIPTION,
  MEM_TABLE,
  MEMORY_REGION,
  PRESETUP_BEGIN,
  PRESETUP_END,
  ProtocolFeature,
  Request,
  SINGLE_REGION_PADDING,
  SINGLE_REGION_SIZE,
  U64,
  VRING_ADDR,
  VRING_NO_FD,
  VRING_STATE,
} from "../../../src/vhost-user/messages.ts";
import { FeatureBit, featureBits, hasFeature } from "../../../src/virtio/features.ts";
import {
  type FdKind,
  type FuzzedMessage,
  type Mutation,
  message,
  mutation,
  REGION_SIZE,
  USER_BASE,
} from "./vhost-user-message.ts";

/** What a front-end may send, and when. */

/** What the front-end that is imitated has been offered. */
export interface Offered {
  readonly features: bigint;
  readonly protocolFeatures: bigint;
  readonly queues: number;
}

const LOG_ALL = featureBits(FeatureBit.vhostLogAll);
const REGIONS = 4;
const RING_SIZE = 64;
/** Answered at any time: shows how far the back-end has come. */
export const MARKER = Request.GET_FEATURES;
const NOTHING = new Uint8Array();

const u64 = (value: bigint | number) => U64.encode({ value: BigInt(value) });
const vring = (index: number, num = 0) => VRING_STATE.encode({ index, num });

function region(index: number, size = REGION_SIZE) {
  const start = index * REGION_SIZE;
  return { guestAddress: start, size, userAddress: USER_BASE + start, fileOffset: 0 };
}

function oneRegion(index: number, size?: number): Uint8Array {
  const payload = new Uint8Array(SINGLE_REGION_SIZE);
  MEMORY_REGION.write(payload, region(index, size), SINGLE_REGION_PADDING);
  return payload;
}

function table(indices: readonly number[]): Uint8Array {
  const payload = new Uint8Array(MEM_TABLE.size + indices.length * MEMORY_REGION.size);
  MEM_TABLE.write(payload, { regions: indices.length });
  for (const [at, index] of indices.entries()) {
    MEMORY_REGION.write(payload, region(index), MEM_TABLE.size + at * MEMORY_REGION.size);
  }
  return payload;
}

function ringAddresses(index: number, place: number): Uint8Array {
  const start = USER_BASE + place;
  return VRING_ADDR.encode({ index, descriptor: start, available: start + 0x1000, used: start + 0x2000 });
}

function configBytes(offset: number, length: number, flags: number): Uint8Array {
  const payload = new Uint8Array(CONFIG.size + length);
  CONFIG.write(payload, { offset, size: length, flags });
  return payload;
}

/** What a front-end that behaves remembers, to know what it may send next. */
class Knowledge {
  negotiated = false;
  features = false;
  readonly slots = new Set<number>();
  /** Rings with size and addresses. */
  readonly sized = new Set<number>();
  readonly placed = new Set<number>();
  readonly kicked = new Set<number>();
  /** An early set-up has begun. */
  preparing = false;

  /** A device may run on the rings that were kicked. */
  get complete(): boolean {
    return this.features && [...this.kicked].every((index) => this.sized.has(index) && this.placed.has(index));
  }

  stopped(index: number): void {
    this.placed.delete(index);
    this.kicked.delete(index);
  }
}

/** A message that is well-formed by itself, and when a front-end that behaves sends it. */
interface Proposal {
  readonly message: FuzzedMessage;
  fits?(known: Knowledge): boolean;
  sent?(known: Knowledge): void;
}

const negotiated = (known: Knowledge) => known.negotiated;

/** Rings lie in the first region, one behind the other. */
const RING_REGION = 0;
const ringPlace = (index: number) => index * 0x4000;

function proposals({ features, protocolFeatures, queues }: Offered) {
  const isStatus = (value: number) => value <= 0xff || hasFeature(protocolFeatures, ProtocolFeature.EXTEND_STATUS);
  return {
    question: (request: number): Proposal => ({ message: message(request) }),
    negotiatedQuestion: (request: number): Proposal => ({ message: message(request), fits: negotiated }),
    protocol: (): Proposal => ({
      message: message(Request.SET_PROTOCOL_FEATURES, u64(protocolFeatures)),
      sent: (known) => {
        known.negotiated = true;
      },
    }),
    features: (logging = false): Proposal => ({
      message: message(Request.SET_FEATURES, u64(logging ? features : features & ~LOG_ALL)),
      sent: (known) => {
        known.features = true;
      },
    }),
    addRegion: (slot: number, kind: FdKind): Proposal => ({
      message: message(Request.ADD_MEM_REG, oneRegion(slot), [kind]),
      fits: (known) => known.negotiated && !known.slots.has(slot),
      sent: (known) => void known.slots.add(slot),
    }),
    removeRegion: (slot: number): Proposal => ({
      message: message(Request.REM_MEM_REG, oneRegion(slot)),
      fits: (known) => known.negotiated && known.slots.has(slot) && slot !== RING_REGION,
      sent: (known) => void known.slots.delete(slot),
    }),
    memoryTable: (slots: readonly number[], kind: FdKind): Proposal => ({
      message: message(
        Request.SET_MEM_TABLE,
        table(slots),
        slots.map((slot) => (slot === RING_REGION ? "memory" : kind)),
      ),
      fits: () => slots.includes(RING_REGION),
      sent: (known) => {
        known.slots.clear();
        for (const slot of slots) known.slots.add(slot);
      },
    }),
    ringSize: (index: number): Proposal => ({
      message: message(Request.SET_VRING_NUM, vring(index, RING_SIZE)),
      sent: (known) => void known.sized.add(index),
    }),
    ringBase: (index: number): Proposal => ({ message: message(Request.SET_VRING_BASE, vring(index)) }),
    ringAddresses: (index: number): Proposal => ({
      message: message(Request.SET_VRING_ADDR, ringAddresses(index, ringPlace(index))),
      fits: (known) => known.slots.has(RING_REGION) && known.sized.has(index),
      sent: (known) => void known.placed.add(index),
    }),
    enable: (index: number, num: number): Proposal => ({
      message: message(Request.SET_VRING_ENABLE, vring(index, num)),
    }),
    ringFd: (request: number, index: number, kind: FdKind | undefined): Proposal => ({
      message:
        kind === undefined ? message(request, u64(BigInt(index) | VRING_NO_FD)) : message(request, u64(index), [kind]),
      fits: (known) => request !== Request.SET_VRING_KICK || (known.sized.has(index) && known.placed.has(index)),
      sent: (known) => {
        if (request === Request.SET_VRING_KICK) known.kicked.add(index);
      },
    }),
    stopRing: (index: number): Proposal => ({
      message: message(Request.GET_VRING_BASE, vring(index)),
      sent: (known) => known.stopped(index),
    }),
    status: (value: number): Proposal => ({
      message: message(Request.SET_STATUS, u64(value)),
      fits: (known) => known.negotiated && isStatus(value) && ((value & 4) === 0 || known.complete),
    }),
    reset: (): Proposal => ({
      message: message(Request.RESET_DEVICE),
      fits: negotiated,
      sent: (known) => {
        known.preparing = false;
        for (let index = 0; index < queues; index++) known.stopped(index);
      },
    }),
    readConfig: (offset: number, length: number): Proposal => ({
      message: message(Request.GET_CONFIG, configBytes(offset, length, 0)),
      fits: negotiated,
    }),
    writeConfig: (): Proposal => ({
      message: message(Request.SET_CONFIG, configBytes(32, 1, 0)),
      fits: negotiated,
    }),
    backChannel: (): Proposal => ({
      message: message(Request.SET_BACKEND_REQ_FD, NOTHING, ["socket"]),
      fits: negotiated,
    }),
    log: (size: number, offset: number, kind: FdKind): Proposal => ({
      message: message(Request.SET_LOG_BASE, LOG_DESCRIPTION.encode({ size, offset }), [kind]),
    }),
    earlySetup: (begins: boolean): Proposal => ({
      message: message(Request.PRESETUP, u64(begins ? PRESETUP_BEGIN : PRESETUP_END)),
      fits: (known) => {
        const possible = begins ? !known.preparing && known.kicked.size === 0 : known.preparing;
        return known.negotiated && hasFeature(protocolFeatures, ProtocolFeature.PRESETUP) && possible;
      },
      sent: (known) => {
        known.preparing = begins;
        if (!begins) for (let index = 0; index < queues; index++) known.stopped(index);
      },
    }),
    logFd: (kind: FdKind): Proposal => ({ message: message(Request.SET_LOG_FD, NOTHING, [kind]) }),
  };
}

/** How each session begins: as far as this, correctly. */
const BEGINNINGS = ["connected", "negotiated", "memory", "prepared", "running", "logging"] as const;
type Beginning = (typeof BEGINNINGS)[number];

/** Of those that have a device run; what was not offered is left out. */
function furthest({ features, protocolFeatures }: Offered): Beginning[] {
  const early = hasFeature(protocolFeatures, ProtocolFeature.PRESETUP) ? (["prepared"] as const) : [];
  const logged = hasFeature(features, FeatureBit.vhostLogAll) ? (["logging"] as const) : [];
  return ["running", ...early, ...logged];
}

function beginning(as: Beginning, offered: Offered): Proposal[] {
  const the = proposals(offered);
  const rings = [0, 1].flatMap((index) => [
    the.ringSize(index),
    the.ringBase(index),
    the.ringAddresses(index),
    the.ringFd(Request.SET_VRING_KICK, index, "eventfd"),
    the.ringFd(Request.SET_VRING_CALL, index, "eventfd"),
  ]);
  const enabled = Array.from({ length: offered.queues }, (_, index) => the.enable(index, 1));
  const early = [0, 1].flatMap((index) => [
    the.ringSize(index),
    the.ringAddresses(index),
    the.ringFd(Request.SET_VRING_KICK, index, undefined),
  ]);
  const steps: Readonly<Record<Beginning, readonly Proposal[]>> = {
    connected: [],
    negotiated: [the.question(Request.GET_PROTOCOL_FEATURES), the.protocol(), the.question(Request.SET_OWNER)],
    memory: [the.addRegion(0, "memory"), the.addRegion(1, "memory")],
    prepared: [the.earlySetup(true), the.features(), ...early, the.earlySetup(false)],
    running: [the.features(), the.status(0x8), ...rings, ...enabled, the.status(0xf)],
    logging: [the.log(4096, 0, "memory"), the.features(true)],
  };
  const upTo = BEGINNINGS.slice(0, BEGINNINGS.indexOf(as) + 1);
  return upTo.filter((step) => step !== "prepared" || as === step).flatMap((step) => steps[step]);
}

function anyProposal(offered: Offered): fc.Arbitrary<Proposal> {
  const the = proposals(offered);
  const { GET_FEATURES, GET_PROTOCOL_FEATURES, SET_OWNER, RESET_OWNER, GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_STATUS } =
    Request;
  const ring = fc.nat(offered.queues - 1);
  const slot = fc.nat(REGIONS - 1);
  const memory = fc.constantFrom<FdKind>("memory", "memory", "memory", "cut memory");
  const signal = fc.constantFrom<FdKind | undefined>("eventfd", "eventfd", "eventfd", "full eventfd", undefined);
  // All, enough for all regions, too small for some of them.
  const logSize = fc.constantFrom(REGION_SIZE, REGION_SIZE, 4096, 4096, 40);
  const ringFd = fc.constantFrom(Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR);
  const weighted: [number, fc.Arbitrary<Proposal>][] = [
    [60, fc.constantFrom(GET_FEATURES, GET_PROTOCOL_FEATURES, SET_OWNER).map(the.question)],
    [60, fc.constantFrom(GET_QUEUE_NUM, GET_MAX_MEM_SLOTS, GET_STATUS).map(the.negotiatedQuestion)],
    [60, ring.map(the.ringSize)],
    [60, ring.map(the.ringBase)],
    [60, ring.map(the.ringAddresses)],
    [20, fc.tuple(ring, fc.nat(1)).map(([index, num]) => the.enable(index, num))],
    [20, fc.tuple(ringFd, ring, signal).map(([request, index, kind]) => the.ringFd(request, index, kind))],
    [4, ring.map(the.stopRing)],
    [20, fc.constant(the.features())],
    [10, fc.constant(the.features(true))],
    [20, fc.constant(the.protocol())],
    [50, fc.tuple(fc.nat(60), fc.nat(12)).map(([offset, length]) => the.readConfig(offset, length))],
    [4, fc.constant(the.writeConfig())],
    [1, fc.constant(the.reset())],
    [1, fc.constant(the.question(RESET_OWNER))],
    [2, fc.constant(the.backChannel())],
    [3, fc.constantFrom(0, 1, 3, 8, 0xb, 0xf, 0x10f).map(the.status)],
    [3, fc.tuple(slot, memory).map(([index, kind]) => the.addRegion(index, kind))],
    [3, slot.map(the.removeRegion)],
    [1, fc.tuple(fc.subarray([0, 1, 2, 3]), memory).map(([slots, kind]) => the.memoryTable(slots, kind))],
    [6, fc.tuple(logSize, fc.constantFrom(0, 0, 4096), memory).map((values) => the.log(...values))],
    [15, fc.boolean().map(the.earlySetup)],
    [2, fc.constantFrom<FdKind>("eventfd", "full eventfd").map(the.logFd)],
  ];
  return fc.oneof(...weighted.map(([weight, arbitrary]) => ({ weight, arbitrary })));
}

/** A front-end from its first message to its last, and how it goes. */
export interface FuzzedSession {
  readonly messages: readonly FuzzedMessage[];
  /** Bytes of a further message that is never complete; then the front-end is gone. */
  readonly tail: Uint8Array;
}

export interface SessionShape {
  /** One of so many messages is not what a front-end that behaves would send: mutated, or at a wrong time. */
  readonly oneBadOf: number;
  /** Most messages after the beginning. */
  readonly length: number;
  /** Of a hundred sessions, so many begin with a device that runs. */
  readonly running: number;
}

/** Changes of a whole beginning: a message is left out, comes twice, or changes places with the next. */
const SHUFFLES = ["none", "none", "none", "none", "drop", "repeat", "swap"] as const;

interface Step {
  readonly proposal: Proposal;
  /** undefined where the front-end behaves. */
  readonly bad: "untimely" | Mutation | undefined;
  readonly needReply: boolean;
}

/** Sessions that begin as a front-end's do, and go wrong. */
export function fuzzedSessions(
  offered: Offered,
  { oneBadOf, length, running }: SessionShape,
): fc.Arbitrary<FuzzedSession> {
  const bad = fc.oneof(
    { weight: oneBadOf - 1, arbitrary: fc.constant(undefined) },
    { weight: 1, arbitrary: fc.oneof(fc.constant("untimely" as const), mutation, mutation) },
  );
  const step: fc.Arbitrary<Step> = fc
    .tuple(anyProposal(offered), bad, fc.nat(7))
    .map(([proposal, how, reply]) => ({ proposal, bad: how, needReply: reply === 0 }));
  const begin = fc
    .tuple(
      fc.oneof(
        { weight: running, arbitrary: fc.constantFrom(...furthest(offered)) },
        { weight: 100 - running, arbitrary: fc.constantFrom<Beginning>("connected", "negotiated", "memory", "memory") },
      ),
      fc.constantFrom(...SHUFFLES),
      fc.nat(60),
    )
    .map(([as, shuffle, at]) => shuffled(beginning(as, offered), shuffle, at))
    .map((all) => all.map((proposal): Step => ({ proposal, bad: "untimely", needReply: false })));
  return fc.record({
    messages: fc
      .tuple(begin, fc.array(step, { minLength: 1, maxLength: length, size: "max" }))
      .map(([before, after]) => play([...before, ...after])),
    tail: fc.oneof(
      { weight: 3, arbitrary: fc.constant(NOTHING) },
      { weight: 1, arbitrary: fc.uint8Array({ maxLength: 40 }) },
    ),
  });
}

/** What is really sent: a front-end that behaves leaves out what it may not send now. */
function play(steps: readonly Step[]): FuzzedMessage[] {
  const known = new Knowledge();
  return steps.flatMap(({ proposal, bad, needReply }) => {
    if (bad === undefined && proposal.fits?.(known) === false) return [];
    proposal.sent?.(known);
    const changed = typeof bad === "function" ? bad(proposal.message) : proposal.message;
    return [needReply ? { ...changed, flags: changed.flags | FLAG_NEED_REPLY } : changed];
  });
}

function shuffled(all: Proposal[], how: (typeof SHUFFLES)[number], at: number): Proposal[] {
  const index = all.length === 0 ? 0 : at % all.length;
  const chosen = all[index];
  const next = all[index + 1];
  if (chosen === undefined || how === "none") return all;
  if (how === "drop") return all.toSpliced(index, 1);
  if (how === "repeat") return all.toSpliced(index, 0, chosen);
  return next === undefined ? all : all.toSpliced(index, 2, next, chosen);
}
