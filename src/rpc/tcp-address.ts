import { isIPv4 } from "node:net";
import { VhostdError } from "../base/errors.ts";

/** A TCP address that only processes of this machine can reach. Made by parseLoopbackAddress. */
export interface LoopbackAddress {
  readonly host: string;
  readonly port: number;
}

const PATTERN = /^(?:\[([^\]]*)\]|([^:]*)):(\d{1,5})$/;

/**
 * Reads HOST:PORT. The control interface has no authentication over TCP, so nothing but loopback is taken.
 * @throws VhostdError badArguments
 */
export function parseLoopbackAddress(text: string): LoopbackAddress {
  const match = PATTERN.exec(text);
  const host = match?.[1] ?? match?.[2] ?? "";
  const port = Number(match?.[3]);
  if (match === null || host === "" || port > 65535) {
    throw new VhostdError("badArguments", `${JSON.stringify(text)} is not an address`, {
      fix: "write it as HOST:PORT, for example 127.0.0.1:12190",
    });
  }
  if (host === "localhost") return { host: "127.0.0.1", port };
  if (host !== "::1" && !(isIPv4(host) && host.startsWith("127."))) {
    throw new VhostdError(
      "badArguments",
      `${host} is not a loopback address: anyone who reaches the port controls the daemon, so it is served to this machine only`,
      { fix: "use 127.0.0.1, localhost or [::1]; from elsewhere, forward the unix socket with ssh -L" },
    );
  }
  return { host, port };
}
