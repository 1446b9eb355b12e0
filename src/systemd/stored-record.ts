import Type from "typebox";
import { VhostdError } from "../base/errors.ts";
import type { Json } from "../base/json.ts";
import { parseStored } from "../base/stored.ts";
import type { OwnedFd } from "../native/fd.ts";
import { fileInfo, memfd, pread, pwrite, sealSize } from "../native/sys.ts";

/** A record as it lies in a memory file; the files that it names are stored beside it. */
export interface RecordText {
  readonly key: string;
  /** Name of each fd, and the id of its file. */
  readonly fds: readonly (readonly [name: string, file: number])[];
  readonly record: Json;
}

/** Bytes. */
const RECORD_MAX = 1 << 20;

const RecordSchema = Type.Object({
  key: Type.String(),
  fds: Type.Array(Type.Tuple([Type.String(), Type.Integer()])),
  record: Type.Unknown(),
});

export function encodeRecord(content: RecordText): Uint8Array {
  return new TextEncoder().encode(JSON.stringify(content));
}

/** The record in a memory file of its own. @throws VhostdError keeperStore where it is too long; SystemError */
export function writeRecord(key: string, bytes: Uint8Array): OwnedFd {
  if (bytes.length > RECORD_MAX) {
    throw new VhostdError("keeperStore", `bytes of the record ${key}: ${bytes.length}, at most ${RECORD_MAX}`);
  }
  using undo = new DisposableStack();
  const file = undo.use(memfd("vhostd-record", bytes.length));
  pwrite(file.number, bytes, 0);
  sealSize(file.number);
  undo.move();
  return file;
}

/** What an earlier process has written. It is not trusted. @throws VhostdError, SystemError where it is no record */
export function readRecord(fd: number): Uint8Array {
  const { kind, filesystem, size } = fileInfo(fd);
  if (kind !== "regular" || filesystem !== "tmpfs" || size > RECORD_MAX) {
    throw new VhostdError("invalid", `a stored record is no memory file of at most ${RECORD_MAX} bytes`);
  }
  const bytes = new Uint8Array(size);
  return bytes.subarray(0, pread(fd, bytes, 0));
}

/** @throws VhostdError invalid */
export function decodeRecord(bytes: Uint8Array): RecordText {
  let value: unknown;
  try {
    value = JSON.parse(new TextDecoder().decode(bytes));
  } catch (cause) {
    throw new VhostdError("invalid", "a stored record is no JSON", { cause });
  }
  return parseStored(RecordSchema, value, "a stored record") as RecordText;
}
