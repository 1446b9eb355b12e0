import Type, { type Static } from "typebox";
import type { Json } from "../base/json.ts";
import { parseStored } from "../base/stored.ts";
import { parsePciAddress } from "../pci/address.ts";
import { PciLayoutSchema } from "../virtio/data-path-record.ts";
import type { PciLayout } from "../virtio/pci-layout.ts";
import { FRONTENDS, namedFrontend } from "./front-end-kind.ts";
import type { VfOptions } from "./vf-parts.ts";

/**
 * Everything that is needed, beside named fds, to go on after this process has died: plain data. The parts belong to
 * the objects that they are made from, which check them when they are revived.
 */

/** The version that this daemon writes. A record of another version is not adopted. */
export const RECORD_VERSION = 1;

export type PfRecord = {
  readonly version: typeof RECORD_VERSION;
  readonly address: string;
  readonly layout: PciLayout;
  readonly function: Json;
  /** The PF's own address space. */
  readonly domain: Json;
  readonly admin:
    | { readonly kind: "none"; readonly reason: string }
    | {
        readonly kind: "vendor";
        readonly version: string;
        readonly queue: Json;
        /** How it can mark the pages that its VFs write. */
        readonly tracking?: readonly string[];
      };
};

export type DomainRecord = {
  readonly version: typeof RECORD_VERSION;
  /** UUID of the VM, or the address of the VF that has the domain for itself. */
  readonly vm: string;
  readonly transport: "vfio" | "vfio-user";
  readonly domain: Json;
};

export type VfRecord = {
  readonly version: typeof RECORD_VERSION;
  /** What the operator said when the VF was added. */
  readonly options: Static<typeof OptionsSchema>;
  /** The internal status that an operator holds it in. */
  readonly held?: "quiesced" | "freezed";
  /** A front-end was given its doorbells. */
  readonly shared?: true;
  /** Its front-end is having it reset. */
  readonly resetting?: true;
  /** Its session ended, and all was given back: what is left of it is to be undone. */
  readonly ending?: true;
  /** null while it is not open: it is to be opened anew. */
  readonly function: Json;
  readonly dataPath: Json;
  /** null where no front-end is connected. */
  readonly session: Json;
  /** What its device still has to give back. */
  readonly rings: Json;
  readonly link: Json;
};

/** Of a VF whose function is not open: who comes after this process opens it anew. */
export function hollowRecord(options: VfOptions, rings: Json): VfRecord {
  const nothing = { function: null, dataPath: null, session: null, link: null };
  return { version: RECORD_VERSION, options, rings, ...nothing };
}

const version = Type.Literal(RECORD_VERSION);

const PfSchema = Type.Object({
  version,
  address: Type.String(),
  layout: PciLayoutSchema,
  function: Type.Unknown(),
  domain: Type.Unknown(),
  admin: Type.Union([
    Type.Object({ kind: Type.Literal("none"), reason: Type.String() }),
    Type.Object({
      kind: Type.Literal("vendor"),
      version: Type.String(),
      queue: Type.Unknown(),
      tracking: Type.Optional(Type.Array(Type.String())),
    }),
  ]),
});

const DomainSchema = Type.Object({
  version,
  vm: Type.String(),
  transport: Type.Union([Type.Literal("vfio"), Type.Literal("vfio-user")]),
  domain: Type.Unknown(),
});

const OptionsSchema = Type.Object({
  address: Type.String(),
  socket: Type.String(),
  mode: Type.Union([Type.Literal("client"), Type.Literal("server")]),
  uuid: Type.Optional(Type.String()),
  unmanaged: Type.Optional(Type.Literal(true)),
  hostNotifier: Type.Optional(Type.Literal(false)),
  frontend: Type.Optional(Type.Enum([...FRONTENDS])),
});

const VfSchema = Type.Object({
  version,
  options: OptionsSchema,
  held: Type.Optional(Type.Enum(["quiesced", "freezed"])),
  shared: Type.Optional(Type.Literal(true)),
  resetting: Type.Optional(Type.Literal(true)),
  ending: Type.Optional(Type.Literal(true)),
  function: Type.Unknown(),
  dataPath: Type.Unknown(),
  session: Type.Unknown(),
  rings: Type.Unknown(),
  link: Type.Unknown(),
});

/** @throws VhostdError invalid where it is not a record of this version; an earlier daemon is not trusted */
export function parsePfRecord(value: Json): PfRecord {
  return parseStored(PfSchema, value, "the record of a PF") as PfRecord;
}

/** @throws VhostdError invalid */
export function parseDomainRecord(value: Json): DomainRecord {
  return parseStored(DomainSchema, value, "the record of a DMA domain") as DomainRecord;
}

/** @throws VhostdError invalid */
export function parseVfRecord(value: Json): VfRecord {
  return parseStored(VfSchema, value, "the record of a VF") as VfRecord;
}

/** What the operator said when the VF was added. @throws VhostdError invalid, badArguments */
export function parseVfOptions(value: Json): VfOptions {
  const { address, socket, mode, uuid, unmanaged, hostNotifier, frontend } = parseStored(
    OptionsSchema,
    value,
    "what was said of the VF",
  );
  return {
    address: parsePciAddress(address),
    socket,
    mode,
    ...(uuid === undefined ? {} : { uuid }),
    ...(unmanaged === undefined ? {} : { unmanaged }),
    ...(hostNotifier === undefined ? {} : { hostNotifier }),
    ...namedFrontend(frontend),
  };
}

/** A part of a live object's state: plain data beside named fds that are borrowed from it. */
export interface Snapshot {
  readonly data: Json;
  readonly fds: ReadonlyMap<string, number>;
}

/** What an fd of a part is called in the record of the whole: `socket` of part `function` is `function:socket`. */
export function joinedName(part: string, name: string): string {
  return `${part}:${name}`;
}

/** The fds of several parts under one roof. */
export function joinFds(parts: Readonly<Record<string, Snapshot | undefined>>): Map<string, number> {
  const joined = new Map<string, number>();
  for (const [part, snapshot] of Object.entries(parts)) {
    for (const [name, fd] of snapshot?.fds ?? []) joined.set(joinedName(part, name), fd);
  }
  return joined;
}

/** The fds of one part, under the names that the part gave them. They are taken out of `joined`. */
export function takeFds<Fd>(joined: Map<string, Fd>, part: string): Map<string, Fd> {
  const own = new Map<string, Fd>();
  for (const [name, fd] of [...joined]) {
    if (!name.startsWith(`${part}:`)) continue;
    own.set(name.slice(part.length + 1), fd);
    joined.delete(name);
  }
  return own;
}

/** Closes whatever is in `fds` when it is disposed of, unless `move` was called before. */
export function closing(fds: ReadonlyMap<string, Disposable>): DisposableStack {
  const stack = new DisposableStack();
  stack.defer(() => {
    for (const fd of fds.values()) fd[Symbol.dispose]();
  });
  return stack;
}
