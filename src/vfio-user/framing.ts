import { VhostdError } from "../base/errors.ts";
import type { Framing } from "../native/message-socket.ts";
import { HEADER } from "./messages.ts";

/** What one side takes in one message. */
export interface FramingLimits {
  /** Bytes after the header. */
  readonly maxBody: number;
  readonly maxFds: number;
}

/** How vfio-user messages are cut out of the stream. */
export function vfioUserFraming(limits: FramingLimits): Framing {
  return {
    headerSize: HEADER.size,
    maxFds: limits.maxFds,
    bodySize(header) {
      const { size } = HEADER.read(header);
      const body = size - HEADER.size;
      if (body < 0) {
        throw new VhostdError("protocol", `vfio-user message says it has ${size} bytes; its header alone has 16`);
      }
      if (body > limits.maxBody) {
        throw new VhostdError("protocol", `vfio-user message has a body of ${body} bytes; at most ${limits.maxBody}`);
      }
      return body;
    },
  };
}

/** A whole message, header and body. */
export function encodeMessage(
  header: { readonly id: number; readonly command: number; readonly flags: number; readonly error?: number },
  body: Uint8Array = new Uint8Array(0),
): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(HEADER.size + body.length);
  HEADER.write(bytes, { ...header, size: bytes.length });
  bytes.set(body, HEADER.size);
  return bytes;
}
