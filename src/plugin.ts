/**
 * The contract between the daemon and a plugin: types only, so that a plugin imports nothing of the host at run time
 * and loads into the single executable too.
 *
 * ```ts
 * import type { Plugin } from "vfe-vhostd/plugin";
 * export default { name: "rng", apiVersion: 1, setup(host) { host.deviceClass({ … }); } } satisfies Plugin;
 * ```
 */

/** The version of this contract. A plugin that names another one is refused when it is registered. */
export type PluginApiVersion = 1;

export interface Plugin {
  readonly name: string;
  readonly apiVersion: PluginApiVersion;
  /** Called once when the plugin is registered; whatever it throws refuses the plugin by name. */
  setup(host: PluginHost): void;
}

export interface PluginHost {
  deviceClass(deviceClass: DeviceClass): void;
  /** How a daemon goes on after the death of the one before. Without one nothing is kept. At most one of all plugins. */
  adoption(policy: AdoptionPolicy): void;
}

/** What is decided, and not done, where a daemon takes up what an earlier one has left with the keeper. */
export interface AdoptionPolicy {
  /** So many VFs are taken up side by side, from 1 on. */
  readonly sideBySide: number;
  /** Which of the VFs that wait is the next one: its place in the list, which is not empty. Their order is that of adding. */
  next(waiting: readonly WaitingVf[]): number;
  /** What becomes of a VF that cannot go on as it was left. */
  fallback(trouble: AdoptionTrouble): AdoptionFallback;
}

/** A VF that waits to be taken up. */
export interface WaitingVf {
  /** PCI address. */
  readonly vf: string;
  /** Somebody has asked for it at the control interface. */
  readonly asked: boolean;
  /** Its front-end has sent something, and waits for an answer perhaps. */
  readonly frontEndWaits: boolean;
}

/**
 * Why a VF cannot go on as it was left. "other version": its record is of another version of the daemon; "not open": its
 * function was just being opened again; "damaged": its record or its fds do not fit; "deadly": daemons died, one after the other,
 * while they took it up; "no PF": its PF is not in service.
 */
export type AdoptionTrouble = "other version" | "not open" | "damaged" | "deadly" | "device gone" | "no PF";

/** "attach": as if it was added by an operator now; "fail": it stays where an operator sees what is wrong. */
export type AdoptionFallback = "attach" | "fail";

/** What differs by virtio device id. The first five members are required, the rest says "nothing special". */
export interface DeviceClass {
  readonly name: string;
  /** VIRTIO 1.2, 5: the device id; the PCI device id is 0x1040 more. */
  readonly virtioId: number;
  /** Device configuration space (VIRTIO 1.2, 5.x.4): field name to offset and type. Nothing beyond it is ever read. */
  readonly configSpace: ConfigTable;
  /** Bits 0 to 23 and 50 to 63; all others belong to the core. */
  readonly features: ClassFeatures;
  /** Virtqueues that a front-end may use, given the configuration space and the features that the function offers. */
  queues(config: ConfigValues, features: bigint): number;
  /**
   * What GET_QUEUE_NUM answers where a front-end may use so many queues: VMMs count those of a network card in pairs.
   * The queues themselves unless said.
   */
  countedQueues?(queues: number): number;

  /** Configuration fields that a front-end may write (SET_CONFIG). None unless said. */
  readonly writableConfig?: readonly string[];
  /** Protocol feature bits of this class beside those of the core (vhost-user, "Protocol features"). */
  readonly protocolFeatures?: readonly number[];
  /** Messages of this class, by request number: they are added to the session's table. None is a request of the core. */
  readonly messages?: Readonly<Record<number, ClassMessage>>;
  /** What `vf -i` shows of the configuration space and the features that the function offers, in this order. */
  describe?(config: ConfigValues, features: bigint): Readonly<Record<string, string>>;
  /**
   * The admin virtqueue of a PF of this class whose registers do not say where it is, given the configuration space and
   * the features that the PF offers. Such a PF cannot be managed where this is left out.
   */
  adminQueue?(config: ConfigValues, features: bigint): number;
  /**
   * Buffers of this queue wait for the world outside (a receive queue): a device may hold them for ever, and gives them
   * back in the order it took them. It is stopped without waiting for them, and takes them once more when it goes on.
   */
  receives?(queue: number): boolean;
  /** The function's own control queue, which no guest sees: a VMM has one of its own for its guest. */
  readonly control?: FunctionControl;
  /** Fields of the class in the state of a managed VF (types 4 to 7 of the vendor's form), in their order. */
  stateFields?(config: ConfigValues, features: bigint): readonly StateField[];
  /** Configuration fields that a device must have the same values in to go on with a state; all unless said. */
  comparedConfig?(features: bigint): readonly string[];
  /**
   * Whether the device reaches the world outside. A guest whose front-end cannot be told of configuration changes is
   * shown it by hanging up. Always, where left out.
   */
  linkUp?(config: ConfigValues, features: bigint): boolean;
  /** A software implementation, for vfe-softvf. */
  readonly softDevice?: SoftDeviceClass;
}

export interface ClassFeatures {
  /** Specification names without prefix, by bit: `{ 6: "BLK_SIZE" }`. Used in logs and `vf -i`. */
  readonly names: Readonly<Record<number, string>>;
  /** Offered to the guest although the function has no such bit; never acknowledged to the function. */
  readonly add?: readonly number[];
  /** Kept from the guest although the function offers them. */
  readonly hide?: readonly number[];
}

/** Little-endian integers; `u48` is a bigint as `u64` is (a MAC address, its first byte lowest). */
export type ConfigFieldType = "u8" | "u16" | "u32" | "u48" | "u64";
export type ConfigTable = Readonly<Record<string, readonly [offset: number, type: ConfigFieldType]>>;
/** Fields beyond what the function implements read as 0. */
export type ConfigValues = Readonly<Record<string, number | bigint>>;

/** The control queue of a function, driven by the daemon after a plain reset. Its commands do not depend on the guest's. */
export interface FunctionControl {
  /** Its index on the function, given what the function says of itself; undefined where it has none. */
  queue(config: ConfigValues, features: bigint): number | undefined;
  /** Feature bits that are acknowledged to the function for it, where offered. */
  readonly features: readonly number[];
  /** What brings a device to serve exactly these queues, in order; sent when it begins to run and when they change. */
  commands(running: FunctionRunning): readonly ControlCommand[];
}

export interface FunctionRunning {
  /** Queues in use by the guest, ascending. */
  readonly queues: readonly number[];
  readonly config: ConfigValues;
  /** That the function offers. */
  readonly features: bigint;
}

export interface ControlCommand {
  /** For logs and errors. */
  readonly name: string;
  /** What the device reads. */
  readonly request: Uint8Array;
  /** Bytes that the device writes. */
  readonly answerSize: number;
  accepted(answer: Uint8Array): boolean;
  /** A device may refuse it: that is logged, and all goes on. */
  readonly optional?: boolean;
}

/** A field of a managed VF's state. */
export interface StateField {
  readonly type: number;
  readonly bytes: Uint8Array;
}

/** One more request of the vhost-user protocol. The core has checked size, fds and `needs` before `handle` is called. */
export interface ClassMessage {
  readonly name: string;
  /** Bytes of payload, exactly. */
  readonly size: number;
  /** The protocol feature bit that must have been negotiated. */
  readonly needs?: number;
  /** File descriptors that come with it, exactly; none unless said. */
  readonly fds?: number;
  /**
   * @param fds borrowed: the core closes them afterwards
   * @returns the payload of the answer, 4096 bytes at most, or nothing where the message has none (a REPLY_ACK is sent
   * by the core)
   * @throws an Error that refuses the message with its text as the reason
   */
  handle(payload: Uint8Array, device: ClassDevice, fds: readonly number[]): Promise<Uint8Array | undefined>;
}

/** What a class's message handler may do to its device. */
export interface ClassDevice {
  readonly config: ConfigValues;
  readonly features: bigint;
  log(text: string): void;
}

/** Makes the software devices of a class. */
export interface SoftDeviceClass {
  /** PCI class code, 24 bits: 0x010000 is a SCSI/mass storage controller. */
  readonly pciClass: number;
  /** Options beside those that every class has (queues, ring size), by name. */
  readonly options: Readonly<Record<string, SoftOption>>;
  /** @throws an Error whose text says which option does not fit and why */
  create(options: SoftOptionValues): SoftDevice;
}

export interface SoftOption {
  /** A relative path starts at the working directory, or at the directory of the configuration file that has it. */
  readonly type: "string" | "path" | "number" | "size" | "boolean";
  readonly description: string;
  readonly default?: SoftOptionValue;
  /** May be set while the device runs (`vfe-softvf set`). */
  readonly live?: boolean;
}
export type SoftOptionValue = string | number | boolean;
export type SoftOptionValues = Readonly<Record<string, SoftOptionValue | undefined>>;

/** One software device: what the guest's driver sees beside the queues, and who serves the queues. */
export interface SoftDevice extends Disposable {
  /** Bits 0 to 23 and 50 to 63 that the device offers. */
  readonly features: bigint;
  /** Virtqueues, a control queue included. */
  readonly queues: number;
  /** The ring worker of the native layer that serves the queues, and its parameters. */
  readonly worker: SoftWorker;
  /** Device configuration space as it is now. */
  config(): Uint8Array;
  /** The driver wrote to the configuration space. Unwritable bytes are ignored. */
  writeConfig(offset: number, bytes: Uint8Array): SoftChange;
  /** The driver reset the device: what it wrote to the configuration space is undone. */
  reset?(): SoftChange;
  /** Whether `set` takes the value now: asked for all options before the first is set. @throws an Error that says why not */
  check?(option: string, value: SoftOptionValue): void;
  /** A live option was set. */
  set(option: string, value: SoftOptionValue): SoftChange;
  /**
   * Serves one request, with the worker "forward" only: what is returned is written to the request's writable buffers, as
   * far as there is room. Whatever it throws fails the device: its driver has to reset it.
   */
  serve?(request: SoftRequest): Promise<Uint8Array>;
  /** The worker says that it reaches the world outside now, or no longer. */
  carrierChanged?(up: boolean): SoftChange;
  /**
   * Fields of the class in the device's state, as `DeviceClass.stateFields`.
   * @param facts by name, what the worker knows of itself: what the driver has told it on the queues
   */
  stateFields?(facts: Readonly<Record<string, number>>): readonly StateField[];
  /** Another device's state was restored; fields that are not known are left alone. @throws an Error that says why not */
  restoreFields?(fields: readonly StateField[]): SoftChange;
}

/** One descriptor chain of a queue that the worker "forward" handed over. */
export interface SoftRequest {
  readonly queue: number;
  /** A copy of its device-readable buffers. */
  readonly readable: Uint8Array;
  /** Room in its device-writable buffers, bytes. */
  readonly writable: number;
}

export interface SoftWorker {
  readonly name: string;
  readonly parameters: Readonly<Record<string, string | number | bigint | boolean>>;
}

/** What follows from a change: a configuration interrupt, parameters for the running worker. */
export interface SoftChange {
  readonly configChanged?: boolean;
  readonly parameters?: SoftWorker["parameters"];
}
