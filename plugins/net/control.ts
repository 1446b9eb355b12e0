import type { ConfigValues, ControlCommand, FunctionControl, StateField } from "vfe-vhostd/plugin";
import { controlQueue } from "./config-space.ts";
import { Feature, has } from "./features.ts";

/** Classes and commands of the control queue (VIRTIO 1.2, 5.1.6.5). */
const RX = { class: 0, promiscuous: 0 } as const;
const MQ = { class: 4, pairsSet: 0 } as const;
/** VIRTIO_NET_OK. */
const OK = 0;

/** Type of the field that says what a VF receives, in the vendor's form of its state, and its bits. */
const RECEIVE_MODE = 4;
const ReceiveMode = { promiscuous: 1 } as const;

/**
 * What the daemon says on the function's own control queue. Which addresses the guest listens to only its VMM knows: the
 * device lets everything through.
 */
export const CONTROL: FunctionControl = {
  queue: controlQueue,
  features: [Feature.ctrlVq, Feature.ctrlRx, Feature.mq],
  commands({ queues, features }) {
    const commands: ControlCommand[] = [];
    if (has(features, Feature.mq)) commands.push(pairsSet(pairsOf(queues)));
    if (has(features, Feature.ctrlRx)) commands.push(promiscuous());
    return commands;
  },
};

/** The same for a VF whose state is written. */
export function stateFields(_config: ConfigValues, _features: bigint): readonly StateField[] {
  return [encodeReceiveMode(true)];
}

export function encodeReceiveMode(promiscuous: boolean): StateField {
  const bytes = new Uint8Array(4);
  new DataView(bytes.buffer).setUint32(0, promiscuous ? ReceiveMode.promiscuous : 0, true);
  return { type: RECEIVE_MODE, bytes };
}

/** @returns whether everything is received; not where no field says. @throws Error where it is cut short */
export function decodeReceiveMode(fields: readonly StateField[]): boolean {
  const bytes = fields.find(({ type }) => type === RECEIVE_MODE)?.bytes;
  if (bytes === undefined) return false;
  if (bytes.length < 4) throw new Error(`its receive mode has ${bytes.length} bytes, 4 are needed`);
  return ((bytes[0] ?? 0) & ReceiveMode.promiscuous) !== 0;
}

/** A device serves the first n pairs: all up to the last one in use. */
function pairsOf(queues: readonly number[]): number {
  return Math.floor(Math.max(0, ...queues) / 2) + 1;
}

function pairsSet(pairs: number): ControlCommand {
  return {
    name: `VQ_PAIRS_SET ${pairs}`,
    request: Uint8Array.of(MQ.class, MQ.pairsSet, pairs & 0xff, pairs >> 8),
    answerSize: 1,
    accepted,
  };
}

function promiscuous(): ControlCommand {
  return {
    name: "RX PROMISC on",
    request: Uint8Array.of(RX.class, RX.promiscuous, 1),
    answerSize: 1,
    accepted,
    optional: true,
  };
}

function accepted(answer: Uint8Array): boolean {
  return answer[0] === OK;
}
