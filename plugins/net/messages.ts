import type { DeviceClass } from "vfe-vhostd/plugin";
import { Feature, has } from "./features.ts";
import { macProblem, macText } from "./mac.ts";

/** Protocol features (vhost-user, "Protocol features"). */
const Protocol = { rarp: 2, mtu: 4 } as const;
/** Requests of the front-end. */
const Request = { sendRarp: 19, netSetMtu: 20 } as const;

/** Least datagram that IPv4 knows (RFC 791), and all that the field takes. */
const MTU_MIN = 68;
const MTU_MAX = 65535;

export const PROTOCOL_FEATURES: readonly number[] = [Protocol.rarp, Protocol.mtu];

export const MESSAGES: NonNullable<DeviceClass["messages"]> = {
  [Request.sendRarp]: {
    name: "SEND_RARP",
    size: 8,
    needs: Protocol.rarp,
    handle: async (payload, { log }) => {
      const mac = readU64(payload) & 0xffff_ffff_ffffn;
      const problem = macProblem(mac);
      if (problem !== undefined) throw new Error(`the address to announce is ${macText(mac)}: ${problem}`);
      log(
        `${macText(mac)} is not announced for the guest, a VF has no way to: its driver has to (GUEST_ANNOUNCE), ` +
          "or the network finds it with the first frame that it sends",
      );
      return undefined;
    },
  },
  [Request.netSetMtu]: {
    name: "NET_SET_MTU",
    size: 8,
    needs: Protocol.mtu,
    handle: async (payload, { config, features, log }) => {
      const mtu = readU64(payload);
      const limit = has(features, Feature.mtu) ? Math.min(MTU_MAX, Number(config["mtu"])) : MTU_MAX;
      if (mtu < MTU_MIN || mtu > limit) {
        throw new Error(`the MTU is ${mtu}; this function takes ${MTU_MIN} to ${limit}`);
      }
      log(`the front-end uses an MTU of ${mtu}`);
      return undefined;
    },
  },
};

function readU64(payload: Uint8Array): bigint {
  return new DataView(payload.buffer, payload.byteOffset).getBigUint64(0, true);
}
