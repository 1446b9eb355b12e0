import type { Deadline } from "../base/deadline.ts";
import { errnoText, SystemError, VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { OperationQueue } from "../base/operation-queue.ts";
import type { OwnedFd } from "../native/fd.ts";
import type { PciAddress } from "../pci/address.ts";
import type { BusEntry } from "../pci/bus.ts";
import type { DmaDomain } from "../pci/dma-domain.ts";
import type { PciFunction } from "../pci/function.ts";
import type { DeviceClass } from "../plugin.ts";
import type { PluginRegistry } from "../plugin-host.ts";
import type { Endpoint } from "../vhost-user/endpoint.ts";
import { configSize, configValues } from "../virtio/config-space.ts";
import { type ClassLookup, DataPath } from "../virtio/data-path.ts";
import type { MoverFactory, StateMover } from "../virtio/mover.ts";
import type { Deadlines } from "./deadlines.ts";
import type { DomainTable } from "./domains.ts";
import type { FrontendKind } from "./front-end-kind.ts";
import type { Keeper } from "./keeper.ts";
import type { MigrationInfo } from "./migration.ts";
import { takeFds, type VfRecord } from "./record.ts";
import type { VfState } from "./vf-state.ts";
import { whileThere } from "./while-there.ts";

const EADDRINUSE = 98;

/** What a VF needs of the daemon around it. */
export interface VfSurroundings {
  readonly plugins: PluginRegistry;
  readonly domains: DomainTable;
  readonly keeper: Keeper;
  readonly log: Logger;
  readonly deadlines: Deadlines;
  /** A VF has changed its state, or what is wrong with it. */
  readonly onState: (vf: {
    readonly address: PciAddress;
    readonly state: VfState;
    readonly reason: string | null;
  }) => void;
  /** What is known of a VF's migration has changed. */
  readonly onMigration: (vf: PciAddress, info: MigrationInfo | null) => void;
  /** A VF whose function was given away serves nobody any more, and is to be opened again. */
  readonly renew: (vf: PciAddress) => void;
  /** Who else has a function open that was closed here, in words; undefined where nobody is known. Never rejects. */
  readonly stillHeld: (entry: BusEntry, deadline: Deadline) => Promise<string | undefined>;
  /** Whether the process with this id is this daemon, which is no front-end. None is, where left out. */
  readonly isOurs?: (pid: number) => boolean;
}

export interface VfOptions {
  readonly address: PciAddress;
  /** Path of the vhost-user socket. */
  readonly socket: string;
  /** `client`: connect to the VMM's socket; `server`: listen for the VMM. */
  readonly mode: "client" | "server";
  /** UUID of the VM: VFs with the same one share guest memory. */
  readonly uuid?: string;
  /** It is moved by its own registers only, and has no PF in service. */
  readonly unmanaged?: true;
  /** Where false no front-end is given its doorbells. */
  readonly hostNotifier?: false;
  /** A front-end with messages of its own beside the standard's; left out for those of the standard. */
  readonly frontend?: FrontendKind;
}

/** What a VF is asked for with. */
export interface AddVf extends Pick<VfOptions, "address" | "socket" | "mode" | "frontend"> {
  readonly uuid?: string;
  /** By its own registers only; it need not be a VF, nor its PF in service. */
  readonly unmanaged?: boolean;
  /** A front-end may map its doorbells, where the function lets it. */
  readonly hostNotifier?: boolean;
}

/** How a VF's PF lets its state be moved. */
export interface VfMover {
  /** undefined where the PF cannot: the VF's own registers are all there is then. */
  readonly make: MoverFactory | undefined;
  /** Why the state cannot be moved now, as a sentence without its end. */
  unmanagedReason(): string;
  /** The turns of its VFs to stand by, so that they hold up nothing that is waited for; left out where none does. */
  readonly standBys?: OperationQueue;
}

/** How a VF's state is moved, as people see it. */
export interface VfManagement {
  readonly mover: StateMover["kind"];
  /** Its PF can freeze, save and restore it. */
  readonly managed: boolean;
  readonly unmanaged_reason: string | null;
}

export function managementOf({ dataPath, mover }: VfParts): VfManagement {
  const managed = dataPath.capabilities.resumeAnywhere;
  return { mover: dataPath.moverKind, managed, unmanaged_reason: managed ? null : mover.unmanagedReason() };
}

/** How a VF without a PF is moved. */
export const UNMANAGED: VfMover = { make: undefined, unmanagedReason: () => "it was added with --unmanaged" };

/** The live objects of one VF. Made by opening the function or from a record: from there on there is no difference. */
export interface VfParts {
  readonly entry: BusEntry;
  readonly fn: PciFunction;
  readonly dataPath: DataPath;
  readonly domain: DmaDomain;
  readonly deviceClass: DeviceClass;
  readonly config: Uint8Array;
  readonly mover: VfMover;
  /** Gives the memory of the function's own control queue back, once the function cannot reach it any more. */
  readonly releaseControl: () => Promise<void>;
}

/**
 * Opens the function, resets it and gives it its DMA domain.
 * @param undo takes what has to be undone where something fails later
 * @throws VhostdError
 */
export async function openParts(
  options: VfOptions,
  entry: BusEntry,
  mover: VfMover,
  around: VfSurroundings,
  undo: AsyncDisposableStack,
  deadline: Deadline,
): Promise<VfParts> {
  const domain = acquireDomain(options, entry, around, undo);
  const fn = undo.use(await domain.open(entry, deadline));
  return await whileThere(fn, deadline, async () => {
    const dataPath = await DataPath.open(fn, classLookup(options, around), deadline, mover.make);
    undo.defer(() => dataPath.abandon());
    logNotices(dataPath, options, around);
    const { deviceClass } = dataPath;
    const config = await deadline.race(readConfig(dataPath));
    const releaseControl = controlRelease(options, domain);
    undo.defer(releaseControl);
    deadline.check();
    await domain.attach(fn);
    undo.defer(() => domain.detach(fn));
    deadline.check();
    await dataPath.openControl(domain, controlOwner(options.address), configValues(deviceClass.configSpace, config));
    return { entry, fn, dataPath, domain, mover, deviceClass, config, releaseControl };
  });
}

/** A function as an earlier process left it, in its domain. */
export interface LeftFunction {
  readonly entry: BusEntry;
  readonly domain: DmaDomain;
  readonly fn: PciFunction;
  /** Where nothing comes of it: this process has nothing of it any more. */
  abandon(): Promise<void>;
}

/**
 * The function of a record, and its domain, which must be there. All of those that a domain has come before anything is
 * changed in it.
 * @throws VhostdError where the record or an fd does not fit
 */
export function reviveFunction(
  options: VfOptions,
  entry: BusEntry,
  record: VfRecord,
  fds: Map<string, OwnedFd>,
  { domains }: VfSurroundings,
): LeftFunction {
  const [vm, transport] = [vmOf(options), entry.transport.kind];
  const domain = domains.acquire(vm, transport);
  try {
    const fn = domain.reviveFunction(entry, record.function, takeFds(fds, "function"));
    const abandon = async () => {
      fn.abandon();
      await domains.release(vm, transport);
    };
    return { entry, domain, fn, abandon };
  } catch (error) {
    void domains.release(vm, transport);
    throw error;
  }
}

/**
 * The same objects from a record and its fds, which are taken out of `fds`. Nothing is said to the function that would
 * disturb it.
 * @throws VhostdError where the record or an fd does not fit
 */
export async function reviveParts(
  options: VfOptions,
  left: LeftFunction,
  record: VfRecord,
  fds: Map<string, OwnedFd>,
  mover: VfMover,
  around: VfSurroundings,
  undo: AsyncDisposableStack,
): Promise<VfParts> {
  const { entry, domain, fn } = left;
  undo.defer(() => left.abandon());
  const own = takeFds(fds, "dataPath");
  const dataPath = DataPath.revive(fn, record.dataPath, own, classLookup(options, around), mover.make);
  undo.defer(() => dataPath.abandon());
  logNotices(dataPath, options, around);
  const { deviceClass } = dataPath;
  const config = await readConfig(dataPath);
  const releaseControl = controlRelease(options, domain);
  return { entry, fn, dataPath, domain, mover, deviceClass, config, releaseControl };
}

/**
 * Lets go of all of it, in this order: it reaches no memory any more, the daemon's own memory is unmapped, the function is
 * closed, its domain is released (and with it what its kernel has mapped, where it was the last). All steps are taken,
 * also where one fails.
 * @param reset taken first
 * @param letKeeperGo the keeper has none of its fds any more
 * @throws VhostdError what could not be done
 */
export async function closeParts(
  { entry, fn, dataPath, domain, releaseControl }: VfParts,
  options: VfOptions,
  { domains }: VfSurroundings,
  reset: () => Promise<void>,
  letKeeperGo: () => Promise<void>,
): Promise<void> {
  await using steps = new AsyncDisposableStack();
  steps.defer(() => domains.release(vmOf(options), entry.transport.kind));
  steps.use(fn);
  steps.defer(releaseControl);
  steps.defer(() => domain.detach(fn));
  // Before it: whoever finds it with the keeper takes it for one that reaches its memory. And closing may take long, and as
  // long as the keeper has its fds it is not closed.
  steps.defer(letKeeperGo);
  steps.defer(reset);
  steps.defer(() => dataPath.abandon());
}

/** What to do about a device that no plugin serves. */
export const LOAD_PLUGIN = "load the plugin of that device class (plugins = [...] in the configuration)";

/** The class of a device, of those that the plugins have. */
function classLookup({ address }: VfOptions, { plugins }: VfSurroundings): ClassLookup {
  return (virtioId) => {
    const deviceClass = plugins.deviceClassById(virtioId);
    if (deviceClass !== undefined) return deviceClass;
    throw new VhostdError("probeFailed", `${address} has virtio device id ${virtioId}, which no plugin serves`, {
      fix: LOAD_PLUGIN,
    });
  };
}

function readConfig(dataPath: DataPath): Promise<Uint8Array> {
  return dataPath.readConfig(configSize(dataPath.deviceClass.configSpace));
}

/** Who holds the memory of a VF's own control queue in the domain of its VM; the guest's memory is held by its address. */
export function controlOwner(address: PciAddress): string {
  return `control/${address}`;
}

function controlRelease(options: VfOptions, domain: DmaDomain): () => Promise<void> {
  return async () => {
    const owner = controlOwner(options.address);
    if (!domain.owners.includes(owner)) return;
    await domain.releaseAll(owner);
  };
}

function logNotices(dataPath: DataPath, { address }: VfOptions, { log }: VfSurroundings): void {
  const own = log.child(`vf ${address}`);
  dataPath.onNotice((text) => own.warn(text));
}

function acquireDomain(
  options: VfOptions,
  entry: BusEntry,
  { domains }: VfSurroundings,
  undo: AsyncDisposableStack,
): DmaDomain {
  const [vm, transport] = [vmOf(options), entry.transport.kind];
  const domain = domains.acquire(vm, transport);
  undo.defer(() => domains.release(vm, transport));
  return domain;
}

/** The name of a VF's record. */
export function vfKey(address: PciAddress): string {
  return `vf/${address}`;
}

/** What tells one VM from another, as far as the operator says. */
export function guestOf({ uuid, socket }: VfOptions): string {
  return uuid ?? socket;
}

/** The name of the VM whose memory this VF may reach. */
export function vmOf(options: VfOptions): string {
  return options.uuid ?? options.address;
}

/** Queues that a front-end may use: what the class says, within what the function has; queue n has vector n + 1. */
export function usableQueues({ deviceClass, dataPath, fn, config, entry }: VfParts): number {
  const queues = deviceClass.queues(configValues(deviceClass.configSpace, config), dataPath.features);
  if (queues < 1 || queues > dataPath.queues) {
    throw new VhostdError(
      "probeFailed",
      `${entry.directory}: ${queues} queues by its configuration, ${dataPath.queues} in its registers`,
    );
  }
  const control = dataPath.controlQueue ?? -1;
  const needed = Math.max(queues - 1, control) + 2;
  if (fn.interrupts.count < needed) {
    const all = control < 0 ? `${queues} queues` : `${queues} queues, the function's own control queue`;
    throw new VhostdError(
      "noVectors",
      `${all} and the configuration need ${needed} MSI-X vectors, the function has ${fn.interrupts.count}`,
      {
        fix: `provision the function with ${needed} vectors, or with fewer queues`,
      },
    );
  }
  return queues;
}

/**
 * Begins to look for the front-end.
 * @param connected one is there already
 * @param listener as of Endpoint.start
 * @throws VhostdError socketInUse, socketPath
 */
export function startEndpoint(endpoint: Endpoint, path: string, connected = false, listener?: OwnedFd): void {
  try {
    endpoint.start(connected, listener);
  } catch (cause) {
    if (!(cause instanceof SystemError)) throw cause;
    if (cause.errno === EADDRINUSE) {
      throw new VhostdError("socketInUse", `another process listens at ${path}`, {
        fix: "end that process, or choose another socket",
        cause,
      });
    }
    throw new VhostdError("socketPath", `${path} cannot be made: ${errnoText(cause.errno)}`, {
      fix: "check that the directory is there and that this user may write to it",
      cause,
    });
  }
}
