import { VhostdError } from "../../base/errors.ts";
import { Command, REGION_ACCESS } from "../../vfio-user/messages.ts";
import type { AccessWidth, RegisterSpace } from "../function.ts";
import type { VfioUserClient } from "./client.ts";
import { checkWritten, decodeRead } from "./replies.ts";

/** Bytes asked for in one message; the least that a server may take is less than this only by its own word. */
const CHUNK = 4096;

/** One region of a function, reached by messages. */
export class VfioUserRegion implements RegisterSpace {
  constructor(
    private readonly client: VfioUserClient,
    private readonly index: number,
    readonly size: number,
  ) {}

  async read(offset: number, width: AccessWidth): Promise<number> {
    const data = await this.request(offset, width);
    // Little-endian, at most 4 bytes.
    return data.reduce((value, byte, i) => value + byte * 2 ** (8 * i), 0);
  }

  async write(offset: number, width: AccessWidth, value: number): Promise<void> {
    this.check(offset, width);
    const body = new Uint8Array(REGION_ACCESS.size + width);
    REGION_ACCESS.write(body, { offset, region: this.index, count: width });
    for (let i = 0; i < width; i++) body[REGION_ACCESS.size + i] = Math.floor(value / 2 ** (8 * i)) & 0xff;
    using reply = await this.client.request(Command.regionWrite, body);
    checkWritten(reply, this.index, offset, width);
  }

  async readBytes(offset: number, length: number): Promise<Uint8Array> {
    const chunk = Math.min(CHUNK, this.client.capabilities.maxDataTransfer);
    const parts: Promise<Uint8Array>[] = [];
    for (let at = 0; at < length; at += chunk) parts.push(this.request(offset + at, Math.min(chunk, length - at)));
    const bytes = new Uint8Array(length);
    for (const [i, part] of (await Promise.all(parts)).entries()) bytes.set(part, i * chunk);
    return bytes;
  }

  private async request(offset: number, count: number): Promise<Uint8Array> {
    this.check(offset, count);
    const body = REGION_ACCESS.encode({ offset, region: this.index, count });
    using reply = await this.client.request(Command.regionRead, body);
    return decodeRead(reply, this.index, offset, count);
  }

  private check(offset: number, count: number): void {
    if (!Number.isInteger(offset) || offset < 0 || offset + count > this.size) {
      throw new VhostdError("barRead", `${count} bytes at ${offset} of region ${this.index}, which has ${this.size}`);
    }
  }
}
