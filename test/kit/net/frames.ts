/** Ethernet frames that say what they are, so that whoever receives one knows whether it is right (without FCS). */

/** Bytes of a frame, without FCS. */
const FRAME_MIN = 60;
export const FRAME_MAX = 1514;
const ETHERNET_HEADER = 14;
/** For experiments on one's own network (IEEE 802, local experimental ethertype 1). */
const TEST_PROTOCOL = 0x88b5;
/** Behind the Ethernet header: stream and sequence number, network byte order. */
const STREAM = 14;
const SEQUENCE = 18;
const CONTENT = 22;
const NOISE = noise(64 << 10);

export type Mac = readonly [number, number, number, number, number, number];

/** @throws RangeError where there are not six bytes */
export function macOf(bytes: Uint8Array): Mac {
  const [a, b, c, d, e, f] = bytes;
  if (f === undefined || bytes.length !== 6) throw new RangeError(`a MAC address has 6 bytes, not ${bytes.length}`);
  return [a!, b!, c!, d!, e!, f];
}

export interface TestFrame {
  readonly to: Mac;
  readonly from: Mac;
  /** Names the sender's stream. */
  readonly stream: number;
  readonly sequence: number;
  /** Bytes. */
  readonly size: number;
}

/** The same frame for the same values, to the last byte. */
export function encodeFrame({ to, from, stream, sequence, size }: TestFrame): Uint8Array<ArrayBuffer> {
  if (size < FRAME_MIN) throw new RangeError(`a frame has at least ${FRAME_MIN} bytes, not ${size}`);
  const bytes = new Uint8Array(size);
  bytes.set(to, 0);
  bytes.set(from, 6);
  const view = new DataView(bytes.buffer);
  view.setUint16(12, TEST_PROTOCOL);
  view.setUint32(STREAM, stream);
  view.setUint32(SEQUENCE, sequence);
  const start = (Math.imul(stream + 1, 40_503) + Math.imul(sequence, 2_654_435_761)) >>> 0;
  const length = size - CONTENT;
  bytes.set(NOISE.subarray(start % (NOISE.length - length), (start % (NOISE.length - length)) + length), CONTENT);
  return bytes;
}

/** What a frame says of itself; undefined where it is none of ours. */
export function readFrame(bytes: Uint8Array): TestFrame | undefined {
  if (bytes.length < Math.max(CONTENT, ETHERNET_HEADER)) return undefined;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (view.getUint16(12) !== TEST_PROTOCOL) return undefined;
  return {
    to: macOf(bytes.subarray(0, 6)),
    from: macOf(bytes.subarray(6, 12)),
    stream: view.getUint32(STREAM),
    sequence: view.getUint32(SEQUENCE),
    size: bytes.length,
  };
}

/** A stream's frames have all sizes that there are, the smallest and the largest often. Bytes. */
export function sizeOf(sequence: number): number {
  const spread = FRAME_MAX - FRAME_MIN + 1;
  if (sequence % 4 === 0) return FRAME_MIN;
  if (sequence % 4 === 1) return FRAME_MAX;
  return FRAME_MIN + ((Math.imul(sequence, 7919) >>> 0) % spread);
}

/** Bytes without a pattern, the same ones in every process (xorshift32, Marsaglia). */
function noise(size: number): Uint8Array {
  const words = new Uint32Array(size / 4);
  let state = 0x2545f491;
  for (let at = 0; at < words.length; at++) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    words[at] = state;
  }
  return new Uint8Array(words.buffer);
}
