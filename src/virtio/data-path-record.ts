import Type, { type Static } from "typebox";
import type { Json } from "../base/json.ts";
import { parseStored } from "../base/stored.ts";
import { ControlQueueSchema } from "./control-queue.ts";
import { DeviceStateSchema } from "./device-state-codec.ts";
import type { MoverSnapshot } from "./mover.ts";

/**
 * A data path as plain data. Beside it go its fds by name: "config-interrupt" (our own eventfd), "kick.N" (the
 * front-end's eventfd of queue N, while it is connected), "control" (the memory of the function's own control queue).
 */

const U16 = Type.Integer({ minimum: 0, maximum: 0xffff });
const U32 = Type.Integer({ minimum: 0, maximum: 0xffff_ffff });
const Tracking = Type.Optional(Type.String({ maxLength: 32 }));
const Place = { bar: Type.Integer({ minimum: 0, maximum: 5 }), offset: U32, size: U32 };

/** PciLayout as it may be found in a record. */
export const PciLayoutSchema = Type.Object({
  virtioId: Type.Integer({ minimum: 1, maximum: 0x3f }),
  common: Type.Object(Place),
  notify: Type.Object({ ...Place, multiplier: U32 }),
  device: Type.Union([Type.Null(), Type.Object(Place)]),
});

const DataPathSchema = Type.Object({
  layout: PciLayoutSchema,
  features: Type.String({ pattern: "^0x[0-9a-f]{1,16}$" }),
  limits: Type.Array(Type.Object({ sizeMax: U16, notifyOff: U16 })),
  mover: Type.Union([
    Type.Object({ kind: Type.Literal("reset"), tracking: Tracking }),
    Type.Object({
      kind: Type.Union([Type.Literal("starting"), Type.Literal("running"), Type.Literal("frozen")]),
      state: DeviceStateSchema,
      tracking: Tracking,
    }),
  ]),
  /** Queues that are set up and running. */
  queues: Type.Array(U16),
  /** The function's own control queue, where it has one. */
  control: Type.Optional(ControlQueueSchema),
});

/** @throws VhostdError invalid */
export function parseDataPathRecord(data: Json): Static<typeof DataPathSchema> {
  return parseStored(DataPathSchema, data, "the stored data path");
}

/** A snapshot as JSON: what is in it is plain, but not by its type. */
export function moverData(snapshot: MoverSnapshot): Json {
  const tracking = snapshot.tracking === undefined ? {} : { tracking: snapshot.tracking };
  if (snapshot.kind === "reset") return { kind: snapshot.kind, ...tracking };
  const { features, status, configVector, config } = snapshot.state;
  const queues = snapshot.state.queues.map(({ inFlight, ...queue }) =>
    inFlight === undefined ? queue : { ...queue, inFlight: [...inFlight] },
  );
  return { kind: snapshot.kind, state: { features, status, configVector, config, queues }, ...tracking };
}
