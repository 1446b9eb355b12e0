/**
 * The state of a virtio device: the only currency between session, movers, records and adoption. *Wanted* states come
 * from the session, *seen* states from the device.
 */
export interface DeviceState {
  /** Driver features as acknowledged (VIRTIO 1.2, 2.2). */
  readonly features: bigint;
  /** Device status field (VIRTIO 1.2, 2.1). */
  readonly status: number;
  /** MSI-X vector of configuration changes. */
  readonly configVector: number;
  /** Device configuration space as the driver reads it. */
  readonly config: Uint8Array;
  /** Only queues that are set up; ascending index. */
  readonly queues: readonly QueueState[];
}

/** One split virtqueue (VIRTIO 1.2, 2.7). Addresses are guest-physical. */
export interface QueueState {
  readonly index: number;
  /** Entries. */
  readonly size: number;
  readonly vector: number;
  /** Set up, and not to be used until it is enabled; left out where the device uses it. */
  readonly disabled?: true;
  /** Descriptor table. */
  readonly desc: number;
  /** Available ring. */
  readonly driver: number;
  /** Used ring. */
  readonly device: number;
  /** Index of the next available entry the device takes, mod 2^16. */
  readonly lastAvail: number;
  /** Index of the next used entry the device writes, mod 2^16. */
  readonly lastUsed: number;
  /**
   * Heads that the device has taken and not given back, where it lists them; left out otherwise. Without such a list
   * `lastAvail` equals `lastUsed`.
   */
  readonly inFlight?: readonly number[];
}

/** The same state with exactly these queues in use. */
export function withEnabled(state: DeviceState, enabled: ReadonlySet<number>): DeviceState {
  const queues = state.queues.map(({ disabled: _, ...queue }) =>
    enabled.has(queue.index) ? queue : { ...queue, disabled: true as const },
  );
  return { ...state, queues };
}

/** Queues in use, ascending. */
export function enabledQueues({ queues }: DeviceState): number[] {
  return queues.flatMap(({ index, disabled }) => (disabled === true ? [] : [index])).sort((a, b) => a - b);
}

/** Those that the device has set up and is not to use. */
export function disabledQueues({ queues }: Pick<DeviceState, "queues">): Set<number> {
  return new Set(queues.filter(({ disabled }) => disabled === true).map(({ index }) => index));
}
