import { VhostdError } from "../base/errors.ts";
import { fieldSize } from "../base/layout.ts";
import type { DeviceClass } from "../plugin.ts";
import { configSize } from "../virtio/config-space.ts";
import type { Backend } from "./backend.ts";
import { CONFIG, CONFIG_FLAG_MIGRATION } from "./messages.ts";
import { Refusal } from "./refusal.ts";

/** Handlers of the messages about the device configuration space. */

/**
 * GET_CONFIG. What the class has and the function does not reads as 0; beyond the class's own table an answer
 * without payload says "error" (vhost-user, VHOST_USER_GET_CONFIG).
 */
export async function readConfig(backend: Backend, payload: Uint8Array): Promise<Uint8Array> {
  const { offset, size, bytes } = parse(payload, "GET_CONFIG");
  const limit = configSize(backend.target.deviceClass.configSpace);
  if (offset + size > limit) {
    backend.log.warn(
      `GET_CONFIG of ${size} bytes at ${offset} reaches beyond the ${limit} bytes of the class: refused`,
    );
    return new Uint8Array();
  }
  const answer = payload.slice();
  const config = await backend.target.readConfig();
  answer.fill(0, CONFIG.size);
  answer.set(config.subarray(offset, offset + bytes.byteLength), CONFIG.size);
  return answer;
}

/** SET_CONFIG: writable fields only. A migrating front-end sends all of them; the others are the function's own. */
export async function writeConfig(backend: Backend, payload: Uint8Array): Promise<void> {
  const { offset, size, flags, bytes } = parse(payload, "SET_CONFIG");
  const fields = writableRanges(backend.target.deviceClass);
  const covered = fields.reduce(
    (sum, field) => sum + Math.max(0, Math.min(field.end, offset + size) - Math.max(field.start, offset)),
    0,
  );
  if (covered !== size && flags !== CONFIG_FLAG_MIGRATION) {
    const writable = fields.map(({ name, start, end }) => `${name} ${start}..${end - 1}`).join(", ") || "none";
    throw new Refusal(`SET_CONFIG of ${size} bytes at ${offset} reaches beyond the writable fields (${writable})`);
  }
  for (const { start, end } of fields) {
    const from = Math.max(start, offset);
    const to = Math.min(end, offset + size);
    if (from >= to) continue;
    backend.config.forget();
    await backend.target.writeConfig(from, bytes.subarray(from - offset, to - offset));
  }
}

function parse(payload: Uint8Array, name: string) {
  const { offset, size, flags } = CONFIG.read(payload);
  const bytes = payload.subarray(CONFIG.size);
  if (size !== bytes.byteLength) {
    throw new VhostdError("protocol", `${name} says ${size} bytes and carries ${bytes.byteLength}`);
  }
  if (flags > CONFIG_FLAG_MIGRATION) {
    throw new VhostdError("protocol", `${name} has flags ${flags}, at most ${CONFIG_FLAG_MIGRATION}`);
  }
  return { offset, size, flags, bytes };
}

function writableRanges({ configSpace, writableConfig = [] }: DeviceClass) {
  return writableConfig.flatMap((name) => {
    const field = configSpace[name];
    return field === undefined ? [] : [{ name, start: field[0], end: field[0] + fieldSize(field[1]) }];
  });
}
