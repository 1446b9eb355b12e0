import { AdminError } from "./admin-error.ts";

type AnyStruct = { readonly name: string; readonly size: number; read(bytes: Uint8Array, at?: number): unknown };

/** A structure of a command's data. @throws AdminError dataTransfer where there are too few bytes */
export function readData<S extends AnyStruct>(structure: S, bytes: Uint8Array, at = 0): ReturnType<S["read"]> {
  const there = bytes.length - at;
  if (there < structure.size) {
    throw new AdminError("dataTransfer", `${structure.name} has ${there} bytes; ${structure.size} needed`);
  }
  return structure.read(bytes, at) as ReturnType<S["read"]>;
}

/** @throws AdminError dataTransfer where the result does not fit */
export function needRoom(room: number, bytes: number): void {
  if (room < bytes) throw new AdminError("dataTransfer", `there is room for ${room} bytes of result; ${bytes} needed`);
}
