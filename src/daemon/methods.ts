import { readdirSync } from "node:fs";
import Type, { type Static } from "typebox";
import { VhostdError } from "../base/errors.ts";
import { parsePciAddress } from "../pci/address.ts";
import type { QueueStats } from "../pci/function.ts";
import { withDiscovery } from "../rpc/discover.ts";
import { type Call, defineMethod, type Method } from "../rpc/method.ts";
import { BUILD_TIME, VERSION } from "../version.ts";
import { TRACKING_LABEL } from "../virtio/admin/vendor.ts";
import { defaultSocket } from "./default-socket.ts";
import type { PfInfo, VfInfo } from "./device-info.ts";
import { FRONTENDS } from "./front-end-kind.ts";
import type { KeeperInfo } from "./keeper.ts";
import { legacyMethods } from "./legacy-methods.ts";
import { isLogging, LOGGING_OPERATIONS, MANUAL_OPERATIONS, MAP_FORMS } from "./manual-operations.ts";
import { MIGRATION_STATES } from "./migration.ts";
import type { DeviceRegistry } from "./registry.ts";

/** What the control interface needs of the registry. */
export type Devices = Pick<
  DeviceRegistry,
  | "addPf"
  | "removePf"
  | "listPfs"
  | "addVf"
  | "removeVf"
  | "listVfs"
  | "listLeftVfs"
  | "vfInfo"
  | "vfStats"
  | "moveVf"
  | "logVf"
  | "onEvent"
>;

/** What it needs of the process. */
export interface DaemonProcess {
  readonly keeperInfo: KeeperInfo | undefined;
  /** @throws VhostdError notSupported */
  upgrade(): void;
}

/** A process that nobody keeps anything of. */
const UNKEPT: DaemonProcess = {
  keeperInfo: undefined,
  upgrade() {
    throw new VhostdError("notSupported", "nobody keeps what it has");
  },
};

const exact = { additionalProperties: false } as const;
const Device = Type.String({ minLength: 1, description: "PCI address, 0000:af:04.5 or af:04.5" });
const DeviceOnly = Type.Object({ device: Device }, exact);
const Nothing = Type.Object({}, exact);
const Mode = Type.Enum(["client", "server"], {
  description: "whether the daemon connects to the socket or listens at it",
});

const Pf = Type.Object({
  pf: Type.String({ description: "PCI address" }),
  class: Type.String({ description: "device class" }),
  vfs: Type.Integer({ description: "VFs of it that are added" }),
  kind: Type.Enum(["software", "vfio"], { description: "how the function is reached" }),
  managed: Type.Boolean({ description: "it can freeze, save and restore its VFs" }),
  migration: Type.Union([Type.String(), Type.Null()], {
    description: "the commands by which it moves the state of its VFs, and their version",
  }),
  admin_queue: Type.Enum(["none", "draining", "ready", "dead"], {
    description: "draining: finishing what was in flight before a restart; dead: it does not answer any more",
  }),
  tracking: Type.Array(Type.Enum(Object.values(TRACKING_LABEL)), {
    description: "how it can mark the pages that its VFs write, as it says",
  }),
  reason: Type.Union([Type.String(), Type.Null()], {
    description: "why it is gone, or cannot move the state of its VFs",
  }),
});

const Phase = (description: string) => Type.Optional(Type.Number({ description }));
const Migration = Type.Object({
  state: Type.Enum([...MIGRATION_STATES], {
    description:
      "at the source tracking, handed-over, or lost where not all is marked that it wrote; at the destination prepared, arrived",
  }),
  since: Type.String({ description: "time of the last change, ISO 8601" }),
  phases: Type.Object(
    {
      begin_tracking: Phase("its PF was told to mark what it writes"),
      tracking: Phase("from then to the stop, or until now"),
      kicks_off: Phase("from the begin of the stop: its kicks were disconnected"),
      freeze: Phase(
        "from the begin of the stop: it was frozen, gave everything back, and all that it had written was marked",
      ),
      stop: Phase("the whole stop"),
      prepare: Phase("it was set up early"),
      start: Phase("it was started, where it had arrived"),
    },
    { description: "how long each phase took, where there was one, milliseconds" },
  ),
  dirty: Type.Union(
    [
      Type.Object({
        pages: Type.Integer({ description: "of 4096 bytes, marked in its front-end's log at the last look" }),
        pages_per_second: Type.Integer({ description: "at least so many were marked since the look before" }),
      }),
      Type.Null(),
    ],
    { description: "what it writes; null where nobody looks" },
  ),
});

const Vf = Type.Object({
  vf: Type.String({ description: "PCI address" }),
  probed: Type.Boolean({ description: "false while it waits to be taken up after a restart" }),
  class: Type.String({ description: "device class" }),
  pf: Type.Union([Type.String(), Type.Null()], { description: "PCI address of its PF" }),
  msix_num: Type.Integer({ description: "interrupt vectors" }),
  queue_num: Type.Integer({ description: "virtqueues" }),
  queue_size: Type.Integer({ description: "entries of the largest ring" }),
  device_feature: Type.String({ description: "feature bits offered by the device, hexadecimal" }),
  driver_feature: Type.Union([Type.String(), Type.Null()], { description: "feature bits accepted by the guest" }),
  config: Type.Record(Type.String(), Type.String(), { description: "what the class shows of its configuration space" }),
  vm_uuid: Type.String({ description: "VM UUID, empty if none was given" }),
  socket_file: Type.String({ description: "vhost-user socket" }),
  mode: Mode,
  connected: Type.Boolean({ description: "a front-end is connected, or what it left is being undone" }),
  configured: Type.Boolean({ description: "the guest's driver runs it" }),
  state: Type.String({ description: "where it is in its life cycle" }),
  reason: Type.Union([Type.String(), Type.Null()], {
    description: "what is wrong with it, or why its last front-end was turned away",
  }),
  mover: Type.Enum(["registers", "vendor", "standard"], { description: "how its state is moved" }),
  managed: Type.Boolean({ description: "its PF can freeze, save and restore it" }),
  unmanaged_reason: Type.Union([Type.String(), Type.Null()], { description: "why it is not managed" }),
  unmanaged: Type.Boolean({ description: "it was added without a PF" }),
  host_notifier: Type.Boolean({ description: "a front-end may map its doorbells" }),
  frontend: Type.Enum([...FRONTENDS], { description: "the messages that its front-end has" }),
  interface: Type.Union([Type.Enum(["vfio-user", "group", "iommufd"]), Type.Null()], {
    description: "how the function is reached; group and iommufd are the kernel's",
  }),
  iommu_group: Type.Union([Type.Integer(), Type.Null()], { description: "of a function of this machine" }),
  numa_node: Type.Union([Type.Integer(), Type.Null()], {
    description: "that it is nearest to, where the machine has some",
  }),
  migration: Type.Union([Migration, Type.Null()], {
    description: "how far the migration of its VM has come; null where it does not migrate",
  }),
});

const LeftVf = Type.Object(
  {
    vf: Type.String({ description: "PCI address" }),
    probed: Type.Literal(false),
    vm_uuid: Type.String({ description: "VM UUID, empty if none was given" }),
    socket_file: Type.String({ description: "vhost-user socket" }),
    mode: Mode,
    unmanaged: Type.Boolean({ description: "it was added without a PF" }),
    state: Type.Enum(["adopting", "failed"]),
    reason: Type.Union([Type.String(), Type.Null()], { description: "why it cannot be taken up" }),
  },
  { description: "a virtual function of the daemon before, which waits to be taken up or cannot be" },
);

const Count = (description: string) => Type.Integer({ description });
const Queues = Type.Union(
  [
    Type.Array(
      Type.Object({
        queue: Count("index"),
        received: Count("descriptor chains that the device has taken"),
        completed: Count("of these, given back"),
        bad: Count("of these, malformed or failed"),
        bytes: Count("data moved, without headers"),
      }),
    ),
    Type.Null(),
  ],
  {
    description:
      "what each queue has done since the function was opened; null where the device does not count or answer",
  },
);
const VfWithQueues = Type.Object({ ...Vf.properties, queue_stats: Queues });

/** The typed methods and those of old clients, in one table. */
export function createMethods(
  devices: Devices,
  log: Parameters<typeof legacyMethods>[1],
  daemon: DaemonProcess = UNKEPT,
): Method[] {
  return withDiscovery({ title: "vfe-vhostd", version: VERSION }, [
    ...deviceMethods(devices),
    ...processMethods(devices, daemon),
    ...legacyMethods(devices, log),
  ]);
}

function deviceMethods(devices: Devices): Method[] {
  return [
    defineMethod({
      name: "pf.add",
      changes: () => true,
      summary: "Takes a physical function into service. Its VFs can be added afterwards.",
      params: DeviceOnly,
      result: Pf,
      handler: async ({ device }) => pfResult(await devices.addPf(parsePciAddress(device))),
    }),
    defineMethod({
      name: "pf.remove",
      changes: () => true,
      summary: "Lets go of a physical function that has no VFs any more.",
      params: DeviceOnly,
      result: Nothing,
      async handler({ device }) {
        await devices.removePf(parsePciAddress(device));
        return {};
      },
    }),
    defineMethod({
      name: "pf.list",
      summary: "The physical functions in service.",
      params: Nothing,
      result: Type.Object({ pfs: Type.Array(Pf) }),
      handler: () => ({ pfs: devices.listPfs().map(pfResult) }),
    }),
    defineMethod({
      name: "vf.add",
      changes: () => true,
      summary: "Takes a virtual function into service and serves it at a vhost-user socket.",
      params: Type.Object(
        {
          device: Device,
          socket: Type.Optional(
            Type.String({ minLength: 1, description: "absolute path; /tmp/vf-ADDRESS if not given" }),
          ),
          mode: Type.Optional(Mode),
          uuid: Type.Optional(Type.String({ description: "VM UUID; VFs of one VM share a DMA domain" })),
          unmanaged: Type.Optional(
            Type.Boolean({ description: "by its own registers only; it need not be a VF, nor its PF in service" }),
          ),
          host_notifier: Type.Optional(
            Type.Boolean({ description: "false: no front-end is given its doorbells to map; true if not given" }),
          ),
          frontend: Type.Optional(
            Type.Enum([...FRONTENDS], {
              description: "nvidia-presetup: NVIDIA's QEMU, which sets a device up early; standard if not given",
            }),
          ),
        },
        exact,
      ),
      result: Vf,
      async handler({ device, socket, mode = "client", uuid = "", ...more }) {
        const address = parsePciAddress(device);
        const place = { address, socket: socket ?? defaultSocket(address), mode };
        const { unmanaged = false, host_notifier: hostNotifier = true, frontend = "standard" } = more;
        return vfResult(await devices.addVf({ ...place, uuid, unmanaged, hostNotifier, frontend }));
      },
    }),
    defineMethod({
      name: "vf.remove",
      changes: () => true,
      summary: "Ends the session of a virtual function and lets go of it.",
      params: Type.Object(
        {
          device: Device,
          force: Type.Optional(
            Type.Boolean({
              description:
                "also while its VM is being migrated: one that arrives may lack what the function has written",
            }),
          ),
        },
        exact,
      ),
      result: Type.Object(
        {
          warning: Type.Optional(
            Type.String({ description: "a front-end was given its doorbells, and can go on using it: who that is" }),
          ),
        },
        exact,
      ),
      async handler({ device, force = false }) {
        const warning = await devices.removeVf(parsePciAddress(device), { force });
        return warning === undefined ? {} : { warning };
      },
    }),
    defineMethod({
      name: "vf.list",
      summary: "The virtual functions in service, of one PF or of all.",
      params: Type.Object({ pf: Type.Optional(Device) }, exact),
      result: Type.Object({ vfs: Type.Array(Vf), left: Type.Array(LeftVf) }),
      handler({ pf }) {
        const parent = pf === undefined ? undefined : parsePciAddress(pf);
        return { vfs: devices.listVfs(parent).map(vfResult), left: devices.listLeftVfs(parent) };
      },
    }),
    defineMethod({
      name: "vf.info",
      summary: "One virtual function, and what its queues have done.",
      params: DeviceOnly,
      result: VfWithQueues,
      async handler({ device }) {
        const address = parsePciAddress(device);
        const queue_stats = queueResults(await devices.vfStats(address));
        return { ...vfResult(devices.vfInfo(address)), queue_stats };
      },
    }),
    defineMethod({
      name: "vf.debug",
      changes: ({ operation }) => operation !== "status",
      summary: "By hand: the internal status of a managed virtual function, and a log of the pages that it writes.",
      params: Type.Object(
        {
          device: Device,
          operation: Type.Enum([...MANUAL_OPERATIONS, ...LOGGING_OPERATIONS], {
            description: "a guest stands still while its VF is quiesced or frozen",
          }),
          map: Type.Optional(
            Type.Enum([...MAP_FORMS], { description: "of start-logging: preferred, where the device has it" }),
          ),
        },
        exact,
      ),
      result: Type.Object({
        vf: Type.String({ description: "PCI address" }),
        internal_status: Type.Enum(["init", "running", "quiesced", "freezed"], {
          description: "after the operation; init: reset and not started",
        }),
        logging: Type.Optional(
          Type.Object(
            {
              mode: Type.String({ description: "how the device marks the pages" }),
              pages: Type.Optional(Type.Integer({ description: "that were written, of 4096 bytes" })),
              milliseconds: Type.Optional(Type.Number({ description: "since the begin" })),
            },
            { description: "of start-logging and stop-logging; what was written is said at the end" },
          ),
        ),
      }),
      async handler({ device, operation, map }) {
        const vf = parsePciAddress(device);
        if (!isLogging(operation)) return { vf, internal_status: await devices.moveVf(vf, operation) };
        const logging = await devices.logVf(vf, operation, map);
        return { vf, internal_status: await devices.moveVf(vf, "status"), logging };
      },
    }),
  ];
}

function processMethods(devices: Devices, daemon: DaemonProcess): Method[] {
  const subscribers = new WeakSet<Call>();
  return [
    defineMethod({
      name: "version",
      summary: "The versions of the daemon and its keeper; for old clients with errno and errstr.",
      params: Nothing,
      result: Type.Object({
        version: Type.String(),
        "vfe-vhostd version": Type.String(),
        "vfe-vhostd build time": Type.String(),
        "vfe-vhostd-ha version": Type.String(),
        "vfe-vhostd-ha build time": Type.String(),
        errno: Type.Integer({ description: "0" }),
        errstr: Type.String({ description: "Success" }),
      }),
      handler() {
        const keeper = daemon.keeperInfo;
        const absent = "vfe-vhostd-ha is not connected";
        return {
          version: VERSION,
          "vfe-vhostd version": VERSION,
          "vfe-vhostd build time": BUILD_TIME,
          "vfe-vhostd-ha version": keeper?.version ?? absent,
          "vfe-vhostd-ha build time": keeper?.build ?? absent,
          errno: 0,
          errstr: "Success",
        };
      },
    }),
    defineMethod({
      name: "upgrade",
      summary: "Ends the daemon so that the next one goes on with everything; whoever supervises it starts that one.",
      changes: () => true,
      params: Nothing,
      result: Nothing,
      handler() {
        daemon.upgrade();
        return {};
      },
    }),
    defineMethod({
      name: "stats",
      summary: "Counts and sizes of the daemon, and what the queues of one virtual function have done.",
      params: Type.Object({ device: Type.Optional(Device) }, exact),
      result: Type.Object({
        pid: Type.Integer({ description: "process id of the daemon" }),
        protected: Type.Boolean({ description: "a keeper has all that it has: a restart is not seen" }),
        pfs: Type.Integer({ description: "PFs in service" }),
        vfs: Type.Integer({ description: "VFs in service" }),
        sessions: Type.Integer({ description: "front-ends connected" }),
        fds: Type.Integer({ description: "open file descriptors" }),
        rss: Type.Integer({ description: "resident memory, bytes" }),
        uptime: Type.Number({ description: "seconds" }),
        queue_stats: Type.Optional(Queues),
      }),
      async handler({ device }) {
        const queues = device === undefined ? undefined : await devices.vfStats(parsePciAddress(device));
        const vfs = devices.listVfs();
        return {
          pid: process.pid,
          protected: daemon.keeperInfo?.protects === true,
          pfs: devices.listPfs().length,
          vfs: vfs.length,
          sessions: vfs.filter(({ connected }) => connected).length,
          // The directory being read is one of them.
          fds: readdirSync("/proc/self/fd").length - 1,
          rss: process.memoryUsage.rss(),
          uptime: process.uptime(),
          ...(queues === undefined ? {} : { queue_stats: queueResults(queues) }),
        };
      },
    }),
    defineMethod({
      name: "events.subscribe",
      summary:
        "From now on this connection gets a notification `event` for each change of a PF or VF, and of a VF's migration.",
      params: Nothing,
      result: Nothing,
      handler(_, call) {
        if (subscribers.has(call)) return {};
        subscribers.add(call);
        const subscription = devices.onEvent((event) => call.notify("event", event));
        call.onClose(() => subscription[Symbol.dispose]());
        return {};
      },
    }),
  ];
}

function pfResult(info: PfInfo): Static<typeof Pf> {
  return { ...info, tracking: [...info.tracking] };
}

function vfResult(info: VfInfo): Static<typeof Vf> {
  const { class_feature_names: _, device_feature, driver_feature, config, ...rest } = info;
  return {
    ...rest,
    config: { ...config },
    device_feature: hexadecimal(device_feature),
    driver_feature: driver_feature === null ? null : hexadecimal(driver_feature),
  };
}

/** As both families of methods show it. */
export function queueResults(queues: readonly QueueStats[] | null): Static<typeof Queues> {
  return queues?.map((counters, queue) => ({ queue, ...counters })) ?? null;
}

function hexadecimal(value: bigint): string {
  return `0x${value.toString(16)}`;
}
