import { asError, ERROR_NUMBERS, type ErrorCode, VhostdError } from "../base/errors.ts";

/** JSON-RPC 2.0, 5.1: codes of the protocol itself. All others here are negated error numbers of the daemon. */
export const RpcCode = {
  parseError: -32700,
  invalidRequest: -32600,
  methodNotFound: -32601,
  invalidParams: -32602,
  internalError: -32603,
} as const;

export type RequestId = string | number | null;

export interface Request {
  readonly method: string;
  readonly params: unknown;
  /** undefined: a notification, which gets no answer. */
  readonly id: RequestId | undefined;
}

export interface ErrorObject {
  readonly code: number;
  /** What was wrong, with the value seen and the limit. */
  readonly message: string;
  readonly data?: Readonly<Record<string, unknown>>;
}

/** A failure of the protocol rather than of the operation. */
export class ProtocolError extends Error {
  constructor(
    readonly code: number,
    message: string,
    readonly data?: Readonly<Record<string, unknown>>,
    /** Of the request at fault, where it could be read. */
    readonly id: RequestId = null,
  ) {
    super(message);
    this.name = "ProtocolError";
  }
}

const decoder = new TextDecoder("utf-8", { fatal: true });

/** @throws ProtocolError parseError */
export function parseJson(message: Uint8Array): unknown {
  try {
    return JSON.parse(decoder.decode(message));
  } catch (error) {
    throw new ProtocolError(RpcCode.parseError, `the message is not JSON: ${asError(error).message}`);
  }
}

/** @throws ProtocolError parseError, invalidRequest */
export function parseRequest(message: Uint8Array): Request {
  const value = parseJson(message);
  if (Array.isArray(value)) {
    throw new ProtocolError(RpcCode.invalidRequest, "batches are not served: send the objects one after the other");
  }
  const { jsonrpc, method, params, id } = value as Record<string, unknown>;
  if (id !== undefined && id !== null && typeof id !== "string" && typeof id !== "number") {
    throw new ProtocolError(RpcCode.invalidRequest, `"id" is ${shown(id)}, expected a string, a number or null`);
  }
  const refuse = (what: string): never => {
    throw new ProtocolError(RpcCode.invalidRequest, what, undefined, id ?? null);
  };
  if (jsonrpc !== "2.0") return refuse(`"jsonrpc" is ${shown(jsonrpc)}, expected "2.0"`);
  if (typeof method !== "string") return refuse(`"method" is ${shown(method)}, expected a string`);
  return { method, params, id };
}

/** What goes to the client about any failure. */
export function toErrorObject(error: unknown): ErrorObject {
  if (error instanceof ProtocolError) {
    return { code: error.code, message: error.message, ...(error.data === undefined ? {} : { data: error.data }) };
  }
  if (error instanceof VhostdError) {
    const reason = error.code === "system" ? {} : { reason: error.code };
    const fix = error.fix === undefined ? {} : { fix: error.fix };
    return { code: -error.number, message: error.message, data: { ...error.data, ...reason, ...fix } };
  }
  return { code: RpcCode.internalError, message: `internal error: ${asError(error).message}` };
}

const PROTOCOL_REASONS: Readonly<Record<number, ErrorCode>> = {
  [RpcCode.parseError]: "protocol",
  [RpcCode.invalidRequest]: "protocol",
  [RpcCode.methodNotFound]: "notSupported",
  [RpcCode.invalidParams]: "badArguments",
  [RpcCode.internalError]: "io",
};

/** The other direction: an answer's `error` as the error that a caller of this process handles. */
export function fromErrorObject(error: ErrorObject): VhostdError {
  const { reason, fix, ...data } = error.data ?? {};
  const details = { ...(typeof fix === "string" ? { fix } : {}), data: { ...data, rpcCode: error.code } };
  const known = PROTOCOL_REASONS[error.code];
  if (known !== undefined) return new VhostdError(known, error.message, details);
  const named = typeof reason === "string" && Object.hasOwn(ERROR_NUMBERS, reason) ? (reason as ErrorCode) : undefined;
  return new VhostdError(named ?? Math.abs(error.code), error.message, details);
}

/** A value in an error text: one line, bounded. */
export function shown(value: unknown): string {
  if (value === undefined) return "missing";
  const text = JSON.stringify(value) ?? String(value);
  return text.length <= 64 ? text : `${text.slice(0, 61)}...`;
}
