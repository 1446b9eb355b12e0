import Type, { type Static } from "typebox";
import { asError, errorNumber, sentence, VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { MapForm } from "../native/dirty-log.ts";
import { type PciAddress, parsePciAddress } from "../pci/address.ts";
import { defineMethod, type Method } from "../rpc/method.ts";
import { InternalStatus, type InternalStatusName } from "../virtio/admin/vendor.ts";
import { FEATURE_NAMES, hasFeature } from "../virtio/features.ts";
import { defaultSocket } from "./default-socket.ts";
import type { LeftVfInfo, VfInfo } from "./device-info.ts";
import { FRONTENDS } from "./front-end-kind.ts";
import { isLogging, type LoggingOperation, type ManualOperation } from "./manual-operations.ts";
import { type Devices, queueResults } from "./methods.ts";

/**
 * The methods of the existing stack's clients, answer for answer: `errno` and `errstr` stand inside the result, also
 * when the request failed, and numbers are strings. What theirs does not have is as in the typed methods.
 */

const exact = { additionalProperties: false } as const;
const Flag = (description: string) => Type.Optional(Type.Boolean({ description }));
const Device = Type.Optional(Type.String({ description: "PCI address" }));

const Answer = Type.Object({
  errno: Type.Integer({ description: "0, or the negated number of the error" }),
  errstr: Type.String({ description: "Success, or what was wrong" }),
  fix: Type.Optional(Type.String({ description: "what to do about it" })),
  warning: Type.Optional(Type.String({ description: "of remove: a front-end can go on using it; who that is" })),
  devices: Type.Optional(Type.Array(Type.Record(Type.String(), Type.Unknown()), { description: "list" })),
  device: Type.Optional(Type.Record(Type.String(), Type.Unknown(), { description: "info" })),
});
type Answer = Static<typeof Answer>;

const PfRequest = Type.Object(
  {
    add: Flag("takes `dev` into service"),
    remove: Flag("lets go of `dev`"),
    list: Flag("lists the PFs"),
    dev: Device,
  },
  exact,
);

const VfRequest = Type.Object(
  {
    add: Flag("takes `vfdev` into service"),
    remove: Flag("lets go of `vfdev`"),
    list: Flag("lists the VFs of `mgmtpf`"),
    info: Flag("describes `vfdev`"),
    debug: Flag("asks for or changes the internal status of `vfdev`, or logs the pages that it writes"),
    vfdev: Device,
    mgmtpf: Device,
    socket_file: Type.Optional(Type.String({ description: "vhost-user socket" })),
    uuid: Type.Optional(Type.String({ description: "VM UUID" })),
    server: Flag("listen at the socket instead of connecting to it"),
    unmanaged: Flag("of add: without a PF; of list: all that were added so, where no `mgmtpf` is named"),
    force: Flag("of remove: also while its VM is being migrated: one that arrives may lack what it has written"),
    host_notifier: Flag("of add: false where no front-end may map its doorbells"),
    frontend: Type.Optional(Type.Enum([...FRONTENDS], { description: "of add: the messages that its front-end has" })),
    test_operation: Type.Optional(
      Type.Union([Type.Integer(), Type.String()], {
        description: "of debug: 1 run, 2 quiesce, 3 freeze, 4 start logging, 5 stop logging, 6 status",
      }),
    ),
    size_mode: Type.Optional(
      Type.Unknown({
        description: "of debug, to start logging: 1 bitmap, 2 bytemap, preferred where the device has it",
      }),
    ),
  },
  exact,
);

export function legacyMethods(devices: Devices, log: Logger): Method[] {
  return [
    defineMethod({
      name: "mgmtpf",
      summary: "For old clients: add, remove or list PFs. Exactly one of the three is true.",
      changes: ({ list }) => list !== true,
      params: PfRequest,
      result: Answer,
      refused: failure,
      handler: (request) => answered(() => carryOutPf(devices, request), log),
    }),
    defineMethod({
      name: "vf",
      summary: "For old clients: add, remove, list or describe VFs. Exactly one of the operations is true.",
      changes: ({ list, info, test_operation }) => list !== true && info !== true && String(test_operation) !== "6",
      params: VfRequest,
      result: Answer,
      refused: failure,
      handler: (request) => answered(() => carryOutVf(devices, request), log),
    }),
  ];
}

type Outcome = Pick<Answer, "device" | "devices" | "warning">;

async function carryOutPf(devices: Devices, request: Static<typeof PfRequest>): Promise<Outcome> {
  switch (operationOf(request, ["add", "remove", "list"])) {
    case "add":
      await devices.addPf(pfAddress(request.dev));
      return {};
    case "remove":
      await devices.removePf(pfAddress(request.dev));
      return {};
    case "list":
      return {
        devices: devices.listPfs().map(({ pf, managed, migration, reason }) => ({
          pf,
          managed,
          ...(migration === null ? {} : { migration }),
          ...told(reason),
        })),
      };
  }
}

async function carryOutVf(devices: Devices, request: Static<typeof VfRequest>): Promise<Outcome> {
  switch (operationOf(request, ["add", "remove", "list", "info", "debug"])) {
    case "add": {
      const address = vfAddress(request.vfdev);
      const { socket_file: socket = defaultSocket(address), uuid = "", server = false } = request;
      const place = { address, socket, mode: server ? "server" : "client" } as const;
      const { unmanaged = false, host_notifier: hostNotifier = true, frontend = "standard" } = request;
      await devices.addVf({ ...place, uuid, unmanaged, hostNotifier, frontend });
      return {};
    }
    case "remove": {
      const warning = await devices.removeVf(vfAddress(request.vfdev), { force: request.force === true });
      return warning === undefined ? {} : { warning };
    }
    case "list":
      return { devices: [...listed(devices, request).map(describeVf), ...left(devices, request).map(describeLeftVf)] };
    case "info":
      return { device: await describeOneVf(devices, vfAddress(request.vfdev)) };
    case "debug": {
      const address = vfAddress(request.vfdev);
      return { device: await debugVf(devices, address, request) };
    }
  }
}

async function debugVf(
  devices: Devices,
  vf: PciAddress,
  { test_operation, size_mode }: Static<typeof VfRequest>,
): Promise<Record<string, unknown>> {
  const operation = manualOperation(test_operation);
  const status = (name: InternalStatusName) => ({ vf, lm_status: String(InternalStatus[name]) });
  if (!isLogging(operation)) return status(await devices.moveVf(vf, operation));
  const { mode, pages, milliseconds } = await devices.logVf(vf, operation, MAP_FORM[String(size_mode)]);
  return {
    ...status(await devices.moveVf(vf, "status")),
    log_mode: mode,
    ...(pages === undefined ? {} : { log_pages: String(pages) }),
    ...(milliseconds === undefined ? {} : { log_milliseconds: String(milliseconds) }),
  };
}

function listed(devices: Devices, { mgmtpf, unmanaged = false }: Static<typeof VfRequest>): VfInfo[] {
  const all = devices.listVfs(
    unmanaged && mgmtpf === undefined
      ? undefined
      : pfAddress(mgmtpf, "give its PCI address, or --unmanaged for those that were added without a PF"),
  );
  return unmanaged ? all.filter((vf) => vf.unmanaged) : all;
}

function left(devices: Devices, { mgmtpf, unmanaged = false }: Static<typeof VfRequest>): LeftVfInfo[] {
  const all = devices.listLeftVfs(mgmtpf === undefined ? undefined : pfAddress(mgmtpf));
  return unmanaged ? all.filter((vf) => vf.unmanaged) : all;
}

/** By the numbers of the existing stack. */
const MANUAL_OPERATION: Readonly<Record<string, ManualOperation | LoggingOperation>> = {
  1: "run",
  2: "quiesce",
  3: "freeze",
  4: "start-logging",
  5: "stop-logging",
  6: "status",
};
/** What is none of them has no meaning, as ever. */
const MAP_FORM: Readonly<Record<string, MapForm>> = { 1: "bitmap", 2: "bytemap" };

function manualOperation(number: number | string | undefined): ManualOperation | LoggingOperation {
  const text = String(number);
  const operation = MANUAL_OPERATION[text];
  if (operation !== undefined) return operation;
  const fix = "choose 1 (run), 2 (quiesce), 3 (freeze), 4 (start logging), 5 (stop logging) or 6 (status)";
  throw new VhostdError("badArguments", `operation ${number === undefined ? "is missing" : `${text} is unknown`}`, {
    fix,
  });
}

function operationOf<const O extends string>(
  request: { readonly [K in O]?: boolean | undefined },
  all: readonly O[],
): O {
  const asked = all.filter((operation) => request[operation] === true);
  const [operation] = asked;
  if (operation === undefined || asked.length > 1) {
    throw new VhostdError("badArguments", `operations asked for: ${asked.join(", ") || "none"}; expected one`, {
      fix: `set one of ${all.join(", ")} to true`,
    });
  }
  return operation;
}

function pfAddress(text: string | undefined, fix = "give its PCI address"): PciAddress {
  if (text === undefined) throw new VhostdError("noPfName", "no PF is named", { fix });
  return parsePciAddress(text);
}

function vfAddress(text: string | undefined): PciAddress {
  if (text === undefined) throw new VhostdError("noVfName", "no VF is named", { fix: "give its PCI address" });
  return parsePciAddress(text);
}

async function answered(operation: () => Promise<Outcome>, log: Logger): Promise<Answer> {
  try {
    return { ...(await operation()), errno: 0, errstr: "Success" };
  } catch (error) {
    if (error instanceof VhostdError) log.info(`refused (${error.number}): ${sentence(error)}`);
    else log.error("a request failed unexpectedly", error);
    return failure(asError(error));
  }
}

function failure(error: Error): Answer {
  const answer = { errno: -errorNumber(error), errstr: error.message };
  return error instanceof VhostdError && error.fix !== undefined ? { ...answer, fix: error.fix } : answer;
}

async function describeOneVf(devices: Devices, address: PciAddress): Promise<Record<string, unknown>> {
  const queues = await devices.vfStats(address);
  const info = devices.vfInfo(address);
  return { ...describeVf(info), ...(info.probed ? { queue_stats: queueResults(queues) } : {}) };
}

function describeLeftVf({ vf, probed, vm_uuid, socket_file, reason }: LeftVfInfo): Record<string, unknown> {
  return { vf, probed, vm_uuid, socket_file, ...told(reason) };
}

function describeVf(info: VfInfo): Record<string, unknown> {
  const { vf, probed, vm_uuid, socket_file, reason } = info;
  if (!probed) return { vf, probed, vm_uuid, socket_file, ...told(reason) };
  return {
    vf,
    probed,
    msix_num: String(info.msix_num),
    queue_num: String(info.queue_num),
    queue_size: String(info.queue_size),
    device_feature: describeFeatures(info),
    ...info.config,
    vm_uuid,
    socket_file,
    configured: info.configured,
    managed: info.managed,
    mover: info.mover,
    ...(info.unmanaged_reason === null ? {} : { unmanaged_reason: info.unmanaged_reason }),
    ...(info.migration === null ? {} : { migration: info.migration }),
    ...told(info.reason),
  };
}

/** What is wrong, where something is: a member that the old clients' scripts do not know and do not meet otherwise. */
function told(reason: string | null): { reason?: string } {
  return reason === null ? {} : { reason };
}

/** Columns that a bit number takes. */
const BIT_WIDTH = 5;

function describeFeatures(info: VfInfo): Record<string, string> {
  const names: Record<string, string> = { value: `0x${info.device_feature.toString(16)}` };
  for (let bit = 0; bit < 64; bit++) {
    if (hasFeature(info.device_feature, bit)) names[String(bit).padStart(BIT_WIDTH)] = featureName(info, bit);
  }
  return names;
}

/** Bits whose names in the headers of Linux do not begin with VIRTIO_F_. */
const HEADER_NAMES: Readonly<Record<number, string>> = {
  26: "VHOST_F_LOG_ALL",
  28: "VIRTIO_RING_F_INDIRECT_DESC",
  29: "VIRTIO_RING_F_EVENT_IDX",
  30: "VHOST_USER_F_PROTOCOL_FEATURES",
};

/** As the headers of Linux spell it. */
function featureName({ class: deviceClass, class_feature_names }: VfInfo, bit: number): string {
  const ofClass = class_feature_names[bit];
  if (ofClass !== undefined) return `VIRTIO_${deviceClass.toUpperCase()}_F_${ofClass}`;
  const ofCore = FEATURE_NAMES[bit];
  return HEADER_NAMES[bit] ?? (ofCore === undefined ? "unknown" : `VIRTIO_F_${ofCore}`);
}
