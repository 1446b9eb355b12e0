import { dirname, join, resolve } from "node:path";
import { fieldSize } from "../../../src/base/layout.ts";
import type { ConfigValues, DeviceClass } from "../../../src/plugin.ts";
import { CONFIG_PAYLOAD_MAX } from "../../../src/vhost-user/messages.ts";
import { configSize } from "../../../src/virtio/config-space.ts";
import { calling, demand, holds } from "./holds.ts";
import { device, strictConfig } from "./inputs.ts";
import { type Check, type LoadedSubject, load } from "./subject.ts";

const HOST = resolve(import.meta.dir, "../../..");
/** Queues that a device can have at all: there are no more doorbells. */
const ADMIN_QUEUE_MAX = 1023;

/** What can be said of a class by asking it alone. */
export const CLASS_CHECKS: readonly Check[] = [
  { name: "the plugin is registered", of: "class", run: async (subject) => void (await load(subject)) },
  { name: "it imports nothing of the host at run time", of: "class", run: importsNothing },
  { name: "its configuration space is a structure", of: "class", run: hasStructure },
  { name: "queues() answers for any device", of: "class", run: countsQueues },
  { name: "describe() and the other members answer for any device", of: "class", run: answers },
  { name: "its control queue is driven for any device", of: "class", run: drivesControl },
];

async function importsNothing({ plugin }: LoadedSubject): Promise<void> {
  const seen = new Set<string>();
  const visit = async (path: string): Promise<void> => {
    if (seen.has(path)) return;
    seen.add(path);
    const transpiler = new Bun.Transpiler({ loader: path.endsWith(".js") ? "js" : "ts" });
    // Types are gone from what it finds.
    for (const { path: target } of transpiler.scanImports(await Bun.file(path).text())) {
      demand(!/^vfe-vhostd(\/|$)/.test(target), `${path} imports ${target} at run time: types only (import type)`);
      if (!/^[./]/.test(target)) continue;
      const file = resolve(dirname(path), target);
      const ofHost = ["src", "bin", "native"].some((folder) => file.startsWith(join(HOST, folder, "/")));
      demand(!ofHost, `${path} imports ${target} of the host at run time: it is not there in the single executable`);
      if (await Bun.file(file).exists()) await visit(file);
    }
  };
  await visit(plugin);
}

async function hasStructure({ deviceClass: { configSpace, writableConfig = [] } }: LoadedSubject): Promise<void> {
  const owner: string[] = [];
  for (const [field, [offset, type]] of Object.entries(configSpace)) {
    for (let byte = offset; byte < offset + fieldSize(type); byte++) {
      const other = owner[byte];
      demand(other === undefined, `configSpace: ${field} and ${other} overlap at byte ${byte}`);
      owner[byte] = field;
    }
  }
  const size = configSize(configSpace);
  demand(size <= CONFIG_PAYLOAD_MAX, `configSpace has ${size} bytes, a message carries ${CONFIG_PAYLOAD_MAX}`);
  demand(new Set(writableConfig).size === writableConfig.length, "writableConfig names a field twice");
}

async function countsQueues({ deviceClass }: LoadedSubject): Promise<void> {
  await holds(device(deviceClass), ({ config, features }) => {
    const ask = () =>
      calling("queues()", () => deviceClass.queues(strictConfig(deviceClass.configSpace, config), features));
    const queues = ask();
    demand(Number.isSafeInteger(queues) && queues >= 1, `queues() is ${queues}, must be a whole number from 1 on`);
    const again = ask();
    demand(again === queues, `queues() is ${queues}, and ${again} when it is asked once more`);
    const counted = calling("countedQueues()", () => deviceClass.countedQueues?.(queues)) ?? queues;
    const valid = Number.isSafeInteger(counted) && counted >= 1 && counted <= queues;
    demand(valid, `countedQueues(${queues}) is ${counted}, must be a whole number from 1 to ${queues}`);
  });
}

async function answers({ deviceClass }: LoadedSubject): Promise<void> {
  const { configSpace } = deviceClass;
  // What the PF of vfe-softvf says of itself: nothing.
  checkAdminQueue(deviceClass, strictConfig(configSpace, new Uint8Array(0)), 0n, ADMIN_QUEUE_MAX);
  await holds(device(deviceClass), ({ config: bytes, features }) => {
    const config = strictConfig(configSpace, bytes);
    const shown = calling("describe()", () => deviceClass.describe?.(config, features)) ?? {};
    for (const [name, text] of Object.entries(shown)) {
      demand(typeof text === "string", `describe(): ${name} is ${Bun.inspect(text)}, must be a text`);
      demand(!/undefined|NaN|\[object/.test(text), `describe(): ${name} is "${text}"`);
    }
    checkAdminQueue(deviceClass, config, features, Number.MAX_SAFE_INTEGER);
    const up = calling("linkUp()", () => deviceClass.linkUp?.(config, features)) ?? true;
    demand(typeof up === "boolean", `linkUp() is ${Bun.inspect(up)}, must be true or false`);
    const compared = calling("comparedConfig()", () => deviceClass.comparedConfig?.(features)) ?? [];
    const unknown = compared.find((field) => !Object.hasOwn(configSpace, field));
    demand(unknown === undefined, `comparedConfig() names ${unknown}, which is not in configSpace`);
    const fields = calling("stateFields()", () => deviceClass.stateFields?.(config, features)) ?? [];
    checkStateFields("stateFields()", fields);
    const first = deviceClass.queues(config, features) - 1;
    for (const queue of [0, first]) {
      const receives = calling("receives()", () => deviceClass.receives?.(queue)) ?? false;
      demand(typeof receives === "boolean", `receives(${queue}) is ${Bun.inspect(receives)}, must be true or false`);
    }
  });
}

function checkAdminQueue({ adminQueue }: DeviceClass, config: ConfigValues, features: bigint, most: number): void {
  const index = calling("adminQueue()", () => adminQueue?.(config, features)) ?? 0;
  const valid = Number.isInteger(index) && index >= 0 && index <= most;
  demand(valid, `adminQueue() is ${index}, must be a whole number from 0 to ${most}`);
}

/** @throws Error where they are not fields of a class in the vendor's form */
export function checkStateFields(member: string, fields: readonly { type: number; bytes: unknown }[]): void {
  let before = 3;
  for (const { type, bytes } of fields) {
    demand(type > before && type <= 7, `${member} has type ${type} after ${before}, must be 4 to 7, ascending`);
    demand(bytes instanceof Uint8Array, `${member}: type ${type} has no bytes`);
    before = type;
  }
}

async function drivesControl({ deviceClass }: LoadedSubject): Promise<void> {
  const { control, configSpace } = deviceClass;
  if (control === undefined) return;
  await holds(device(deviceClass), ({ config: bytes, features }) => {
    const config = strictConfig(configSpace, bytes);
    const index = calling("control.queue()", () => control.queue(config, features));
    if (index === undefined) return;
    const forGuest = calling("queues()", () => deviceClass.queues(config, features));
    demand(
      Number.isInteger(index) && index >= forGuest,
      `control.queue() is ${index}: the guest has the queues 0 to ${forGuest - 1}`,
    );
    for (const running of [[], [0], [forGuest - 1]]) {
      const given = { queues: running, config, features };
      for (const command of calling("control.commands()", () => control.commands(given))) {
        const { name, request, answerSize } = command;
        demand(
          request instanceof Uint8Array && request.length > 0,
          `command ${name} has nothing for the device to read`,
        );
        demand(Number.isInteger(answerSize) && answerSize >= 0, `command ${name} has an answer of ${answerSize} bytes`);
        for (const byte of [0, 1, 0xff]) {
          const accepted = calling(`${name}: accepted()`, () =>
            command.accepted(new Uint8Array(answerSize).fill(byte)),
          );
          demand(typeof accepted === "boolean", `${name}: accepted() is ${Bun.inspect(accepted)}`);
        }
      }
    }
  });
}
