import { describe, expect, test } from "bun:test";
import Type from "typebox";
import { VhostdError } from "../../../src/base/errors.ts";
import { type Call, defineMethod } from "../../../src/rpc/method.ts";
import { fromErrorObject, toErrorObject } from "../../../src/rpc/protocol.ts";
import { parseLoopbackAddress } from "../../../src/rpc/tcp-address.ts";
import { rejection } from "../../kit/rejection.ts";

const call: Call = { client: "test", notify() {}, log() {}, onClose() {} };

const method = defineMethod({
  name: "vf.add",
  summary: "Adds.",
  params: Type.Object(
    {
      device: Type.String({ description: "PCI address", minLength: 1 }),
      mode: Type.Optional(Type.Union([Type.Literal("client"), Type.Literal("server")])),
      queues: Type.Optional(Type.Integer({ minimum: 1, maximum: 5 })),
      tags: Type.Optional(Type.Array(Type.String())),
    },
    { additionalProperties: false },
  ),
  result: Type.Object({}),
  handler: () => ({}),
});

describe("parameters that do not fit are named with what was expected", () => {
  const cases: [unknown, string][] = [
    [{}, `vf.add: parameter "device" is missing, expected a non-empty string (PCI address)`],
    [undefined, `vf.add: parameter "device" is missing, expected a non-empty string (PCI address)`],
    [{ device: 1 }, `vf.add: parameter "device" is 1, expected a non-empty string (PCI address)`],
    [{ device: "a", mode: "x" }, `vf.add: parameter "mode" is "x", expected "client" or "server"`],
    [{ device: "a", queues: 9 }, `vf.add: parameter "queues" is 9, expected an integer from 1 to 5`],
    [{ device: "a", tags: ["b", 1] }, `vf.add: parameter "tags[1]" is 1, expected a string`],
    [{ device: "a", typo: 1 }, `vf.add: parameter "typo" is not known, known are: device, mode, queues, tags`],
    [JSON.parse(`{"device":"a","__proto__":{}}`), `vf.add: parameter "__proto__" is not known`],
    [["a"], "vf.add: parameters are passed by name, in an object"],
    [null, `vf.add: parameter "device" is missing`],
    [[], `vf.add: parameter "device" is missing`],
    ["a", "vf.add: parameters are passed by name, in an object"],
  ];
  for (const [params, message] of cases) {
    test(JSON.stringify(params) ?? "none", async () => {
      expect(await rejection(method.invoke(params, call))).toMatchObject({
        code: -32602,
        message: expect.stringContaining(message),
      });
    });
  }

  test("the parameter is in the data, for programs", async () => {
    expect(await rejection(method.invoke({ device: 1 }, call))).toMatchObject({
      data: { parameter: "device", expected: "a non-empty string (PCI address)" },
    });
  });
});

test("an error keeps its number, reason and fix over the wire", () => {
  const error = new VhostdError("pfNotFound", "no PF 0000:5a:00.0", { fix: "add it first", data: { pf: "x" } });
  const wire = toErrorObject(error);
  expect(wire).toEqual({
    code: -1001,
    message: "no PF 0000:5a:00.0",
    data: { reason: "pfNotFound", fix: "add it first", pf: "x" },
  });
  const back = fromErrorObject(JSON.parse(JSON.stringify(wire)));
  expect(back).toMatchObject({ number: 1001, code: "pfNotFound", message: error.message, fix: "add it first" });
});

test("a bug is told from an operation that failed", () => {
  expect(toErrorObject(new TypeError("x is undefined"))).toEqual({
    code: -32603,
    message: "internal error: x is undefined",
  });
});

describe("TCP addresses", () => {
  test("of this machine are taken", () => {
    expect(parseLoopbackAddress("127.0.0.1:12190")).toEqual({ host: "127.0.0.1", port: 12190 });
    expect(parseLoopbackAddress("localhost:1")).toEqual({ host: "127.0.0.1", port: 1 });
    expect(parseLoopbackAddress("[::1]:0")).toEqual({ host: "::1", port: 0 });
  });
  for (const text of ["0.0.0.0:1", "192.168.0.1:1", "[::]:1", "example.org:1", "127.0.0.1.example.org:1"]) {
    test(`${text} is refused: not loopback`, () => {
      expect(() => parseLoopbackAddress(text)).toThrow("not a loopback address");
    });
  }
  for (const text of ["", "127.0.0.1", ":12190", "127.0.0.1:65536", "127.0.0.1:http"]) {
    test(`${JSON.stringify(text)} is refused: not an address`, () => {
      expect(() => parseLoopbackAddress(text)).toThrow("is not an address");
    });
  }
});
