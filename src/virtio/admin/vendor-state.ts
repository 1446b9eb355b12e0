import { VhostdError } from "../../base/errors.ts";
import type { DeviceClass } from "../../plugin.ts";
import { configValues } from "../config-space.ts";
import { type DeviceState, disabledQueues, enabledQueues, type QueueState, withEnabled } from "../device-state.ts";
import type { FreezeMode, MoverHost } from "../mover.ts";
import { describeStatus } from "../pci-device.ts";
import { NO_VECTOR } from "../registers.ts";
import { availHeads, type RingMemory, usedIndex } from "../split-ring.ts";
import type { VendorState } from "./state-blob.ts";

/** The state of a device as it was saved, checked against what it was configured with. */
export interface SavedState {
  readonly state: DeviceState;
  /** By queue: buffers that were completed and are not in the used ring yet. */
  readonly unreported: ReadonlyMap<number, number>;
}

/**
 * Each queue says where it begins.
 * @throws VhostdError notSupported where buffers are in flight that it does not list
 */
export function checkBases(wanted: DeviceState, name: string): void {
  for (const { index, lastAvail, lastUsed, inFlight = [] } of wanted.queues) {
    const difference = (lastAvail - lastUsed) & 0xffff;
    if (difference === inFlight.length) continue;
    throw new VhostdError(
      "notSupported",
      `queue ${index} of ${name} is to resume with available index ${lastAvail} and used index ${lastUsed}, ` +
        `but ${inFlight.length} of the ${difference} buffers between them are known`,
      { fix: "restart the guest's driver (reboot the guest)", data: { queue: index, lastAvail, lastUsed } },
    );
  }
}

/**
 * A state in the vendor's form. All queues of the device are in it, as the vendor's software has it.
 * @param configGeneration as the device's register says
 */
export function toVendorState(
  wanted: DeviceState,
  { features, limits, deviceClass }: Pick<MoverHost, "features" | "limits" | "deviceClass">,
  configGeneration: number,
): VendorState {
  const queueOf = (index: number) => wanted.queues.find((queue) => queue.index === index);
  const config = configValues(deviceClass.configSpace, wanted.config);
  return {
    common: {
      deviceFeatureSelect: 0,
      deviceFeatures: features,
      driverFeatureSelect: 0,
      driverFeatures: wanted.features,
      configVector: wanted.configVector,
      numQueues: limits.length,
      queueSelect: 0,
      status: wanted.status,
      configGeneration,
    },
    config: wanted.config,
    queues: limits.map(({ sizeMax, notifyOff }, index) => {
      const queue = queueOf(index);
      return {
        index,
        size: queue?.size ?? sizeMax,
        vector: queue?.vector ?? NO_VECTOR,
        enable: queue === undefined || queue.disabled === true ? 0 : 1,
        notifyOff,
        desc: BigInt(queue?.desc ?? 0),
        driver: BigInt(queue?.driver ?? 0),
        device: BigInt(queue?.device ?? 0),
        // Means nothing without NOTIF_CONFIG_DATA.
        notifyData: 0,
        reset: 0,
      };
    }),
    indices: limits.map((_, index) => {
      const { lastAvail = 0, lastUsed = 0, disabled = false } = queueOf(index) ?? {};
      // A device has nothing in flight of a queue that it does not use.
      return { index, lastAvail: disabled ? lastUsed : lastAvail, lastUsed };
    }),
    inFlight: wanted.queues.flatMap(({ index, inFlight = [], disabled }) =>
      inFlight.length === 0 || disabled === true ? [] : [{ queue: index, heads: inFlight }],
    ),
    completed: [],
    others: deviceClass.stateFields?.(config, features) ?? [],
  };
}

/**
 * What the device saved, which is not trusted: all but the indices must be what it was configured with. A queue that is
 * disabled stands where it was configured to, unless the device has it set up, as one does that its registers started:
 * then it stands where it was used last.
 * @param own the function's own control queue, which no state has
 * @throws VhostdError io, naming what differs
 */
export function readSaved(
  saved: VendorState,
  configured: DeviceState,
  name: string,
  own: number | undefined,
): SavedState {
  const { common } = saved;
  const differs = (what: string, seen: string | number | bigint, known: string | number | bigint) => {
    if (seen === known) return;
    throw new VhostdError("io", `${name} saved another state than it was given: ${what} ${seen} instead of ${known}`);
  };
  differs("status", describeStatus(common.status), describeStatus(configured.status));
  differs("features", `0x${common.driverFeatures.toString(16)}`, `0x${configured.features.toString(16)}`);
  differs("configuration vector", common.configVector, configured.configVector);
  const disabled = disabledQueues(configured);
  const setUp = saved.queues.filter(({ enable, index }) => enable !== 0 && index !== own);
  const indices = setUp.map(({ index }) => index).filter((index) => !disabled.has(index));
  const inUse = indices.sort((a, b) => a - b).join(", ");
  differs("queues", `[${inUse}]`, `[${enabledQueues(configured).join(", ")}]`);
  for (const queue of setUp) {
    const known = configured.queues.find(({ index }) => index === queue.index)!;
    differs(`queue ${queue.index} size`, queue.size, known.size);
    differs(`queue ${queue.index} vector`, queue.vector, known.vector);
    for (const ring of ["desc", "driver", "device"] as const) {
      differs(`queue ${queue.index} ${ring}`, queue[ring], BigInt(known[ring]));
    }
  }
  const config = new Uint8Array(configured.config.length);
  config.set(saved.config.subarray(0, config.length));
  const known = new Set(setUp.map(({ index }) => index));
  const queues = configured.queues.map((queue) => {
    if (!known.has(queue.index)) return queue;
    const seen = withIndices(queue, saved, name);
    return queue.disabled === true ? untaken(seen) : seen;
  });
  return {
    state: { ...configured, config, queues },
    unreported: new Map(saved.completed.map(({ queue, heads }) => [queue, heads.length])),
  };
}

/**
 * A state with other queues in use: those that the device has that saved this. An earlier process may have been changing
 * them when it died.
 * @param own as of `readSaved`
 */
export function withQueuesOf(saved: VendorState, configured: DeviceState, own: number | undefined): DeviceState {
  const setUp = new Set(saved.queues.filter(({ enable }) => enable !== 0).map(({ index }) => index));
  // One that its registers started has all queues set up: which are in use it was told by a queue of its own.
  return own !== undefined && setUp.has(own) ? configured : withEnabled(configured, setUp);
}

/** The state with queues that are not in use any more where the guest's memory says; they have drained. */
export function ended(state: DeviceState, before: DeviceState, memory: RingMemory): DeviceState {
  const known = disabledQueues(before);
  const queues = state.queues.map((queue) => {
    if (queue.disabled !== true || known.has(queue.index)) return queue;
    const lastUsed = usedIndex(memory, queue);
    return { ...queue, lastAvail: lastUsed, lastUsed };
  });
  return { ...state, queues };
}

/**
 * The same state for a device that may have been given a part of another one; undefined where it cannot be, because the
 * device has more than can be given back. Then it was given nothing either: see `undrained`.
 */
export function repeatable(saved: VendorState, { receives }: Pick<DeviceClass, "receives">): VendorState | undefined {
  if (saved.completed.some(({ heads }) => heads.length > 0)) return undefined;
  const listed = (index: number) => saved.inFlight.find(({ queue }) => queue === index)?.heads.length ?? 0;
  const isListed = ({ index, lastAvail, lastUsed }: VendorState["indices"][number]) =>
    ((lastAvail - lastUsed) & 0xffff) === listed(index);
  if (saved.indices.some((one) => !isListed(one) && receives?.(one.index) !== true)) return undefined;
  const rewind = saved.indices.filter((one) => !isListed(one)).map(({ index }) => index);
  return {
    ...saved,
    indices: saved.indices.map((one) => (rewind.includes(one.index) ? { ...one, lastAvail: one.lastUsed } : one)),
    inFlight: saved.inFlight.filter(({ queue }) => !rewind.includes(queue)),
  };
}

/**
 * The state with receive queues that take their buffers once more: those that wait for the world outside are the next ones
 * of the ring. Where a device lists others it is left as it is.
 * @throws VhostdError badAddress where the memory is gone
 */
export function rewound(
  saved: SavedState,
  memory: RingMemory,
  { receives }: Pick<DeviceClass, "receives">,
): SavedState {
  const queues = saved.state.queues.map((queue) => {
    const { index, lastAvail, lastUsed, inFlight, disabled } = queue;
    const waiting = receives?.(index) === true && disabled !== true;
    if (!waiting || lastAvail === lastUsed) return queue;
    if (inFlight !== undefined && !sameHeads(inFlight, availHeads(memory, queue, lastUsed, lastAvail))) return queue;
    return untaken(queue);
  });
  return { ...saved, state: { ...saved.state, queues } };
}

/** The state without what its receive queues have taken. */
export function withoutReceived(state: DeviceState, { receives }: Pick<DeviceClass, "receives">): DeviceState {
  return { ...state, queues: state.queues.map((queue) => (receives?.(queue.index) === true ? untaken(queue) : queue)) };
}

/**
 * Why a freezed device cannot be left as it is, or undefined. The memory is the guest's, and the used index in it what
 * the guest goes by.
 * @param modeOf a queue, by its index
 * @throws VhostdError badAddress where the memory is gone; io where the device contradicts it
 */
export function undrained(
  { state, unreported }: SavedState,
  memory: RingMemory,
  modeOf: (queue: number) => FreezeMode,
): string | undefined {
  for (const queue of state.queues) {
    const { index, lastAvail, lastUsed, inFlight = [], disabled } = queue;
    if (disabled === true) continue;
    const used = usedIndex(memory, queue);
    const taken = (lastAvail - lastUsed) & 0xffff;
    const at = `(available ${lastAvail}, used ${lastUsed}, in the guest's memory ${used})`;
    if (used !== lastUsed) return `queue ${index} has not written back all of its used buffers ${at}`;
    const completed = unreported.get(index) ?? 0;
    if (completed > 0) return `queue ${index} has ${completed} completed buffers that are not in the used ring ${at}`;
    if (taken === 0) continue;
    if (modeOf(index) === "drained") return `queue ${index} has ${taken} buffers in use ${at}`;
    if (inFlight.length !== taken) {
      return `queue ${index} has ${taken} buffers in use and lists ${inFlight.length} of them ${at}`;
    }
  }
  return undefined;
}

/** @throws VhostdError io */
function withIndices(queue: QueueState, saved: VendorState, name: string): QueueState {
  const { index, size } = queue;
  const broken = (what: string) =>
    new VhostdError("io", `${name} saved a state that makes no sense: queue ${index} ${what}`);
  const state = saved.indices.find((one) => one.index === index);
  if (state === undefined) throw broken("has no indices");
  const { lastAvail, lastUsed } = state;
  const taken = (lastAvail - lastUsed) & 0xffff;
  if (taken > size) throw broken(`has ${taken} buffers in use, of ${size} (available ${lastAvail}, used ${lastUsed})`);
  const heads = saved.inFlight.find((one) => one.queue === index)?.heads ?? [];
  const seen = new Set<number>();
  for (const head of heads) {
    if (head >= size || seen.has(head)) throw broken(`lists descriptor ${head} of ${size} in flight, or twice`);
    seen.add(head);
  }
  const { inFlight: _, ...rest } = queue;
  return { ...rest, lastAvail, lastUsed, ...(heads.length === 0 ? {} : { inFlight: heads }) };
}

function untaken({ inFlight: _, ...queue }: QueueState): QueueState {
  return { ...queue, lastAvail: queue.lastUsed };
}

/** The order in which a device lists its heads means nothing. */
function sameHeads(a: readonly number[], b: readonly number[]): boolean {
  const sorted = (heads: readonly number[]) => [...heads].sort((x, y) => x - y).join();
  return sorted(a) === sorted(b);
}
