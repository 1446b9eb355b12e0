import type {
  SoftChange,
  SoftDevice,
  SoftDeviceClass,
  SoftOptionValue,
  SoftOptionValues,
  StateField,
} from "vfe-vhostd/plugin";
import { CONFIG_SPACE, DUPLEXES, Status } from "./config-space.ts";
import { decodeReceiveMode, encodeReceiveMode } from "./control.ts";
import { Feature } from "./features.ts";
import { macProblem, macText, parseMac } from "./mac.ts";

/** Where frames go: an interface of the host, the other end of a wire, or back. */
const BACKENDS = ["tap", "wire", "echo"] as const;
type Backend = (typeof BACKENDS)[number];

/** What the kernel takes of one TAP (MAX_TAP_QUEUES). */
const PAIRS_MAX = 256;
/** IFNAMSIZ without the zero behind it. */
const INTERFACE_NAME_MAX = 15;
const WIRE_NAME_MAX = 64;
const MTU_MIN = 68;
const MTU_MAX = 65535;
/** Mb/s; what is beyond says that the device does not know. */
const SPEED_MAX = 0x7fff_ffff;
/** Bytes. */
const CONFIG_SIZE = 24;

/** What the control queue says where nothing was said on it (VIRTIO 1.2, 5.1.6.5). */
const DRIVER_SILENT = { promiscuous: false, pairsInUse: 1 } as const;

/** A network card whose frames go to software. */
export const softDevice: SoftDeviceClass = {
  pciClass: 0x020000,
  options: {
    queues: {
      type: "number",
      description: "pairs of queues, receive and transmit; a control queue is added",
      default: 1,
    },
    backend: { type: "string", description: `where frames go: ${BACKENDS.join(", ")}` },
    tap: { type: "string", description: "name of the interface, with --backend tap; it is made where there is none" },
    wire: {
      type: "string",
      description: "name of the wire, with --backend wire; a number at its end is halved: VFs 2k and 2k + 1 share one",
      default: "{pf}/{vf}",
    },
    mac: {
      type: "string",
      description: "address; with +N behind it the one that is N further on",
      default: "02:00:00:00:00:00+{vf}",
      live: true,
    },
    mtu: { type: "number", description: `largest datagram, ${MTU_MIN} to ${MTU_MAX}`, default: 1500, live: true },
    link: { type: "boolean", description: "the link may be up", default: true, live: true },
    speed: { type: "number", description: "what the driver is told, Mb/s", default: 10_000 },
    duplex: { type: "string", description: `what the driver is told: ${DUPLEXES.join(" or ")}`, default: "full" },
    controlQueue: {
      type: "boolean",
      description: "there is a control queue; without it only one pair can be used",
      default: true,
    },
  },
  create: (options) => new NetSoftDevice(options),
};

class NetSoftDevice implements SoftDevice {
  readonly features: bigint;
  readonly queues: number;
  readonly worker: SoftDevice["worker"];
  private readonly bytes = new Uint8Array(CONFIG_SIZE);
  private readonly view = new DataView(this.bytes.buffer);
  /** What the operator wants, and whether the worker reaches anybody. */
  private link: boolean;
  private carrier = false;

  constructor(options: SoftOptionValues) {
    const pairs = checkWithin("queues", options["queues"], 1, PAIRS_MAX);
    const backend = checkBackend(options["backend"]);
    const place = { tap: checkInterface, wire: checkWire, echo: () => ({}) }[backend](options);
    const mac = checkMac(options["mac"]);
    const mtu = checkWithin("mtu", options["mtu"], MTU_MIN, MTU_MAX);
    const speed = checkWithin("speed", options["speed"], 0, SPEED_MAX);
    const duplex = checkDuplex(options["duplex"]);
    const control = options["controlQueue"] !== false;
    this.link = options["link"] !== false;
    this.features = featuresOf(backend, pairs, control);
    this.queues = 2 * pairs + (control ? 1 : 0);
    this.setMac(mac);
    this.setMtu(mtu);
    this.view.setUint16(CONFIG_SPACE.maxVirtqueuePairs[0], pairs, true);
    this.view.setUint32(CONFIG_SPACE.speed[0], speed, true);
    this.view.setUint8(CONFIG_SPACE.duplex[0], duplex);
    this.showLink();
    const { link } = this;
    this.worker = { name: "net", parameters: { backend, ...place, pairs, mac, mtu, link, ...DRIVER_SILENT } };
  }

  config(): Uint8Array {
    return this.bytes.slice();
  }

  /** Nothing of it can be written (VIRTIO 1.2, 5.1.4.2). */
  writeConfig(): SoftChange {
    return {};
  }

  reset(): SoftChange {
    return { parameters: DRIVER_SILENT };
  }

  check(option: string, value: SoftOptionValue): void {
    if (option === "mac") checkMac(value);
    if (option === "mtu") checkWithin("mtu", value, MTU_MIN, MTU_MAX);
  }

  set(option: string, value: SoftOptionValue): SoftChange {
    switch (option) {
      case "mac": {
        const mac = checkMac(value);
        this.setMac(mac);
        return { configChanged: true, parameters: { mac } };
      }
      case "mtu": {
        const mtu = checkWithin("mtu", value, MTU_MIN, MTU_MAX);
        this.setMtu(mtu);
        return { configChanged: true, parameters: { mtu } };
      }
      case "link":
        this.link = value === true;
        return { configChanged: this.showLink(), parameters: { link: this.link } };
      default:
        throw new Error(`option ${option} cannot be set while the device runs`);
    }
  }

  carrierChanged(up: boolean): SoftChange {
    this.carrier = up;
    return { configChanged: this.showLink() };
  }

  stateFields(facts: Readonly<Record<string, number>>): readonly StateField[] {
    return [encodeReceiveMode(facts["promiscuous"] === 1)];
  }

  /** Nobody tells a restored device on its control queue which pairs are in use: those that are enabled. */
  restoreFields(fields: readonly StateField[]): SoftChange {
    return { parameters: { promiscuous: decodeReceiveMode(fields), pairsInUse: 0 } };
  }

  [Symbol.dispose](): void {}

  private setMac(mac: bigint): void {
    this.view.setUint32(CONFIG_SPACE.mac[0], Number(mac & 0xffff_ffffn), true);
    this.view.setUint16(CONFIG_SPACE.mac[0] + 4, Number(mac >> 32n), true);
  }

  private setMtu(mtu: number): void {
    this.view.setUint16(CONFIG_SPACE.mtu[0], mtu, true);
  }

  /** @returns whether the driver sees another link now */
  private showLink(): boolean {
    const [at] = CONFIG_SPACE.status;
    const before = this.view.getUint16(at, true);
    const now = this.link && this.carrier ? Status.linkUp : 0;
    this.view.setUint16(at, now, true);
    return now !== before;
  }
}

/** Only the kernel, behind a TAP, completes what the other end of an offload has left undone. */
function featuresOf(backend: Backend, pairs: number, control: boolean): bigint {
  const { mac, status, mtu, mrgRxbuf, speedDuplex, mq, ctrlVq, ctrlRx } = Feature;
  const { csum, guestCsum, guestTso4, guestTso6, guestEcn, hostTso4, hostTso6, hostEcn } = Feature;
  const bits: number[] = [mac, status, mtu, mrgRxbuf, speedDuplex];
  if (backend === "tap") bits.push(csum, guestCsum, guestTso4, guestTso6, guestEcn, hostTso4, hostTso6, hostEcn);
  if (pairs > 1) bits.push(mq);
  if (control) bits.push(ctrlVq, ctrlRx);
  return bits.reduce((word, bit) => word | (1n << BigInt(bit)), 0n);
}

function checkBackend(value: SoftOptionValue | undefined): Backend {
  const found = BACKENDS.find((backend) => backend === value);
  if (found !== undefined) return found;
  const is = value === undefined ? "missing" : JSON.stringify(value);
  throw new Error(`option backend is ${is}, must be one of ${BACKENDS.join(", ")}`);
}

function checkInterface({ tap }: SoftOptionValues): { readonly tap: string } {
  if (tap === undefined) throw new Error("option tap is missing: name an interface ({vf} stands for the VF's number)");
  if (typeof tap === "string" && new RegExp(`^[^\\s/:%]{1,${INTERFACE_NAME_MAX}}$`).test(tap)) return { tap };
  throw new Error(`option tap is ${JSON.stringify(tap)}, must be the name of an interface, 1 to 15 characters`);
}

/** VFs 2k and 2k + 1 of a PF are at the ends of one wire, unless they are given another name. */
function checkWire({ wire }: SoftOptionValues): { readonly wire: string } {
  const match = typeof wire === "string" && wire.length <= WIRE_NAME_MAX ? /^(.*?)(\d{0,9})$/.exec(wire) : null;
  if (match === null) {
    throw new Error(`option wire is ${JSON.stringify(wire)}, must be a name of at most ${WIRE_NAME_MAX} characters`);
  }
  const [, name = "", number = ""] = match;
  return { wire: number === "" ? name : `${name}${Math.floor(Number(number) / 2)}` };
}

function checkMac(value: SoftOptionValue | undefined): bigint {
  const mac = typeof value === "string" ? parseMac(value) : undefined;
  if (mac === undefined) {
    throw new Error(`option mac is ${JSON.stringify(value)}, must be like 02:00:00:00:00:01 or 02:00:00:00:00:00+1`);
  }
  const problem = macProblem(mac);
  if (problem !== undefined) throw new Error(`option mac is ${macText(mac)}: ${problem}`);
  return mac;
}

function checkDuplex(value: SoftOptionValue | undefined): number {
  const duplex = DUPLEXES.indexOf(String(value));
  if (duplex >= 0) return duplex;
  throw new Error(`option duplex is ${JSON.stringify(value)}, must be ${DUPLEXES.join(" or ")}`);
}

function checkWithin(option: string, value: SoftOptionValue | undefined, low: number, high: number): number {
  if (typeof value === "number" && Number.isInteger(value) && value >= low && value <= high) return value;
  throw new Error(`option ${option} is ${value}, must be from ${low} to ${high}`);
}
