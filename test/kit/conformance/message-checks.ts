import fc from "fast-check";
import type { OwnedFd } from "../../../src/native/fd.ts";
import { eventfd, memfd } from "../../../src/native/sys.ts";
import type { ClassMessage, DeviceClass } from "../../../src/plugin.ts";
import { offeredProtocolFeatures } from "../../../src/vhost-user/features.ts";
import { protocolFeatureName } from "../../../src/vhost-user/messages.ts";
import { CLASS_ANSWER_MAX, requestTable } from "../../../src/vhost-user/requests.ts";
import { hasFeature } from "../../../src/virtio/features.ts";
import { MockTarget } from "../mock-target.ts";
import { describeDescriptor, leftOpen, openDescriptors } from "./descriptors.ts";
import { demand, holds, outcome, refusal } from "./holds.ts";
import { device, NoSuchField, strictConfig } from "./inputs.ts";
import { type Check, type LoadedSubject, PATIENCE } from "./subject.ts";

/** Without making a failure small: that takes as long again for each try, where something hangs. */
const TRIALS = { runs: 60, shrink: false };

/** What a class does with messages of its own. */
export const MESSAGE_CHECKS: readonly Check[] = [
  { name: "its messages can be sent", of: "class", run: canBeSent },
  { name: "its messages answer or refuse, whatever is in them", of: "class", run: answerOrRefuse },
  { name: "its messages leave file descriptors alone", of: "class", run: leaveDescriptors },
];

async function canBeSent({ deviceClass }: LoadedSubject): Promise<void> {
  const offered = offeredProtocolFeatures(new MockTarget({ deviceClass }));
  for (const { name, needs } of messagesOf(deviceClass)) {
    if (needs === undefined) continue;
    const feature = `${protocolFeatureName(needs)} (${needs})`;
    demand(
      hasFeature(offered, needs),
      `${name} needs protocol feature ${feature}, which protocolFeatures does not offer`,
    );
  }
  requestTable(deviceClass);
}

async function answerOrRefuse(subject: LoadedSubject): Promise<void> {
  for (const message of messagesOf(subject.deviceClass)) {
    const inputs = messageTo(subject.deviceClass, message);
    await holds(inputs, (input) => deliver(subject, message, input, makeFds(message)), TRIALS);
  }
}

async function leaveDescriptors(subject: LoadedSubject): Promise<void> {
  for (const message of messagesOf(subject.deviceClass)) {
    let warm = false;
    const deliverAndCount = async (input: Input) => {
      // What is opened once and kept belongs to the process.
      if (!warm) await deliver(subject, message, input, makeFds(message));
      warm = true;
      const before = openDescriptors();
      const fds = makeFds(message);
      const given = fds.map(({ number }) => describeDescriptor(number));
      await deliver(subject, message, input, fds);
      const left = await leftOpen(before);
      const kept = left.find((description) => given.includes(description));
      demand(kept === undefined, `${message.name} keeps a file descriptor of the message open (${kept})`);
      demand(left.length === 0, `${message.name} leaves ${left.length} file descriptors open: ${left.join(", ")}`);
    };
    await holds(messageTo(subject.deviceClass, message), deliverAndCount, TRIALS);
  }
}

function messagesOf({ messages = {} }: DeviceClass): ClassMessage[] {
  return Object.values(messages);
}

interface Input {
  readonly payload: Uint8Array;
  readonly config: Uint8Array;
  readonly features: bigint;
}

function messageTo(deviceClass: DeviceClass, { size }: ClassMessage): fc.Arbitrary<Input> {
  const bytes = fc.uint8Array({ minLength: size, maxLength: size });
  // Small numbers are where what is valid and what is not meet.
  const small = fc.tuple(bytes, fc.nat(3)).map(([payload, used]) => payload.map((byte, at) => (at < used ? byte : 0)));
  const payload = fc.oneof(bytes, small);
  return fc.tuple(device(deviceClass), payload).map(([about, payload]) => ({ ...about, payload }));
}

/** As many as come with the message, of two kinds. */
function makeFds({ fds = 0 }: ClassMessage): OwnedFd[] {
  return Array.from({ length: fds }, (_, index) => (index % 2 === 0 ? eventfd() : memfd("conformance", 4096)));
}

/** As the core does: it checks, lends and closes. */
async function deliver(
  { deviceClass: { configSpace }, patience = PATIENCE }: LoadedSubject,
  message: ClassMessage,
  { payload, config: bytes, features }: Input,
  fds: readonly OwnedFd[],
): Promise<void> {
  const { name } = message;
  const numbers = fds.map(({ number }) => number);
  const before = numbers.map(describeDescriptor);
  const config = strictConfig(configSpace, bytes);
  const log = (text: string) => demand(typeof text === "string" && text !== "", `${name} logs ${Bun.inspect(text)}`);
  const isOpen = (index: number) => describeDescriptor(numbers[index]!) === before[index];
  try {
    const device = { config, features, log };
    const result = await outcome(name, patience, () => message.handle(payload.slice(), device, numbers));
    if ("thrown" in result) {
      const { message: text } = refusal(name, result.thrown);
      demand(!(result.thrown instanceof NoSuchField), `${name}: ${text}`);
    } else {
      const answer = result.value;
      demand(answer === undefined || answer instanceof Uint8Array, `${name} answers ${Bun.inspect(answer)}`);
      const size = answer?.length ?? 0;
      demand(size <= CLASS_ANSWER_MAX, `${name} answers ${size} bytes, limit ${CLASS_ANSWER_MAX}`);
    }
    const closed = numbers.findIndex((_, index) => !isOpen(index));
    demand(closed < 0, `${name} closes file descriptor ${closed} of the message, which is only lent`);
  } finally {
    for (const [index, fd] of fds.entries()) if (isOpen(index)) fd[Symbol.dispose]();
  }
}
