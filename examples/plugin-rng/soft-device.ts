import type {
  SoftChange,
  SoftDevice,
  SoftDeviceClass,
  SoftOptionValue,
  SoftOptionValues,
  SoftRequest,
} from "vfe-vhostd/plugin";

/** Of one request, bytes: what getRandomValues gives at a time. A device may fill less than the buffer (5.4.6.2). */
const ANSWER_MAX = 65_536;

/** An entropy device that answers from the random numbers of the system. */
export const softDevice: SoftDeviceClass = {
  pciClass: 0x00ff00,
  options: {
    answerSize: {
      type: "number",
      description: `bytes that a request gets at most, 1 to ${ANSWER_MAX}`,
      default: ANSWER_MAX,
      live: true,
    },
  },
  create: (options) => new RngSoftDevice(options),
};

class RngSoftDevice implements SoftDevice {
  readonly features = 0n;
  readonly queues = 1;
  readonly worker = { name: "forward", parameters: {} };
  private answerSize: number;

  constructor({ queues, answerSize }: SoftOptionValues) {
    if (queues !== 1) throw new Error(`option queues is ${queues}, an entropy device has 1`);
    this.answerSize = checkAnswerSize(answerSize);
  }

  config(): Uint8Array {
    return new Uint8Array(0);
  }

  writeConfig(): SoftChange {
    return {};
  }

  check(option: string, value: SoftOptionValue): void {
    if (option === "answerSize") checkAnswerSize(value);
  }

  set(option: string, value: SoftOptionValue): SoftChange {
    if (option !== "answerSize") throw new Error(`option ${option} cannot be set while the device runs`);
    this.answerSize = checkAnswerSize(value);
    return {};
  }

  async serve({ readable, writable }: SoftRequest): Promise<Uint8Array> {
    if (readable.length > 0 || writable === 0) {
      throw new Error(`a request has ${readable.length} bytes to read and ${writable} to fill, must be 0 and some`);
    }
    return crypto.getRandomValues(new Uint8Array(Math.min(writable, this.answerSize)));
  }

  [Symbol.dispose](): void {}
}

function checkAnswerSize(value: SoftOptionValue | undefined): number {
  if (typeof value === "number" && Number.isInteger(value) && value >= 1 && value <= ANSWER_MAX) return value;
  throw new Error(`option answer-size is ${value}, must be from 1 to ${ANSWER_MAX}`);
}
