import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { MessageSplitter } from "../../../src/rpc/splitter.ts";

const bytes = (text: string) => new TextEncoder().encode(text);
const text = (message: Uint8Array) => new TextDecoder().decode(message);

function split(pieces: readonly Uint8Array[], splitter = new MessageSplitter()): string[] {
  return pieces.flatMap((piece) => [...splitter.push(piece)].map(text));
}

describe("MessageSplitter", () => {
  test("finds any objects again, however the stream is cut", () => {
    const object = fc.dictionary(fc.string({ unit: "binary" }), fc.jsonValue({ maxDepth: 4 }));
    const separator = fc.constantFrom("", " ", "\n", "\r\n\t");
    fc.assert(
      fc.property(
        fc.array(fc.tuple(object, separator), { maxLength: 6 }),
        fc.infiniteStream(fc.integer({ min: 1, max: 40 })),
        (items, sizes) => {
          const stream = bytes(items.map(([value, after]) => JSON.stringify(value) + after).join(""));
          const pieces: Uint8Array[] = [];
          for (let at = 0; at < stream.length; ) {
            const size = sizes.next().value!;
            pieces.push(stream.subarray(at, at + size));
            at += size;
          }
          expect(split(pieces)).toEqual(items.map(([value]) => JSON.stringify(value)));
        },
      ),
    );
  });

  test("brackets and quotes inside strings do not count", () => {
    const tricky = `{"a":"}]\\"{[","b\\\\":["\\\\"]}`;
    expect(split([bytes(tricky + tricky)])).toEqual([tricky, tricky]);
  });

  test("a message of the size limit passes, one byte more does not", () => {
    const limits = { size: 16, depth: 4 };
    expect(split([bytes(`{"a":"12345678"}`)], new MessageSplitter(limits))).toHaveLength(1);
    expect(() => split([bytes(`{"a":"123456789"}`)], new MessageSplitter(limits))).toThrow("longer than 16 bytes");
    expect(() => split([bytes(`{"a":"12`), bytes("3456789012")], new MessageSplitter(limits))).toThrow("16 bytes");
  });

  test("a message nested to the limit passes, one level more does not", () => {
    const nested = (levels: number) => bytes("[".repeat(levels) + "]".repeat(levels));
    expect(split([nested(64)])).toHaveLength(1);
    expect(() => split([nested(65)])).toThrow("deeper than 64");
  });

  test("what cannot begin a message ends the stream", () => {
    expect(() => split([bytes("POST / HTTP/1.1\r\n\r\n{}")])).toThrow("byte 0x50");
  });

  test("says whether a message has begun", () => {
    const splitter = new MessageSplitter();
    split([bytes(`{} {"a"`)], splitter);
    expect(splitter.partial).toBe(true);
    split([bytes(`:1}`)], splitter);
    expect(splitter.partial).toBe(false);
  });
});
