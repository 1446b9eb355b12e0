import { linkSymbols } from "bun:ffi";
import { existsSync } from "node:fs";
import { dirname, join } from "node:path";
import { SystemError } from "../base/errors.ts";

/** The Node-API face of native/: what has threads. Numbers are results >= 0 or -errno. */
interface Addon {
  /** Addresses of the C functions, by name. */
  readonly symbols: Readonly<Record<string, number>>;
  pollerStart(report: (tokens: readonly number[]) => void): number;
  pollerStop(): void;
  pollerAdd(fd: number, out: boolean): number;
  pollerRearm(token: number): number;
  pollerRemove(token: number): void;
  pollerHold(keepsLoopAlive: boolean): void;
  relayStart(): number;
  relayStop(): void;
  relayToEventfd(kick: number, eventfd: number): number;
  relayToAddress(kick: number, address: number, width: number, value: number): number;
  relayDisconnect(connection: number): void;
  slowClose(fd: number): Promise<number>;
  slowAccess(fd: number, table: Uint8Array): Promise<number>;
  slowIoctl(fd: number, request: number, argument: Uint8Array | number): Promise<number>;
  slowWait(): void;
}

/** The C face: names and types as in native/symbols.h. Strings end with a zero byte. */
const SYMBOLS = {
  vhostd_close: { args: ["i32"], returns: "i32" },
  vhostd_new_lane: { args: [], returns: "i64_fast" },
  vhostd_close_later: { args: ["i64_fast", "i32"], returns: "i32" },
  vhostd_pending_closes: { args: ["i64_fast"], returns: "i64_fast" },
  vhostd_wait_for_closes: { args: ["i32"], returns: "i32" },
  vhostd_dup: { args: ["i32"], returns: "i32" },
  vhostd_compare_files: { args: ["i32", "i32"], returns: "i32" },
  vhostd_lock: { args: ["i32"], returns: "i32" },
  vhostd_eventfd: { args: [], returns: "i32" },
  vhostd_signal_eventfd: { args: ["i32"], returns: "i32" },
  vhostd_drain_eventfd: { args: ["i32"], returns: "i64_fast" },
  vhostd_memfd: { args: ["ptr", "i64_fast"], returns: "i32" },
  vhostd_seal_size: { args: ["i32"], returns: "i32" },
  vhostd_open: { args: ["ptr", "i32"], returns: "i32" },
  vhostd_truncate: { args: ["i32", "i64_fast"], returns: "i32" },
  vhostd_pread: { args: ["i32", "ptr", "i64_fast", "i64_fast"], returns: "i64_fast" },
  vhostd_pwrite: { args: ["i32", "ptr", "i64_fast", "i64_fast"], returns: "i64_fast" },
  vhostd_file_info: { args: ["i32", "ptr"], returns: "i32" },
  vhostd_ioctl: { args: ["i32", "i64_fast", "ptr"], returns: "i32" },
  vhostd_raise_open_file_limit: { args: [], returns: "i64_fast" },
  vhostd_connect_unix: { args: ["ptr"], returns: "i32" },
  vhostd_connect_datagram: { args: ["ptr"], returns: "i32" },
  vhostd_listen_unix: { args: ["ptr", "i32"], returns: "i32" },
  vhostd_listen_again: { args: ["i32"], returns: "i32" },
  vhostd_accept: { args: ["i32"], returns: "i32" },
  vhostd_socket_pair: { args: ["ptr"], returns: "i32" },
  vhostd_peer_credentials: { args: ["i32", "ptr"], returns: "i32" },
  vhostd_is_hung_up: { args: ["i32"], returns: "i32" },
  vhostd_is_unix_stream: { args: ["i32"], returns: "i32" },
  vhostd_shutdown: { args: ["i32"], returns: "i32" },
  vhostd_unread: { args: ["i32"], returns: "i64_fast" },
  vhostd_peek: { args: ["i32", "ptr", "i64_fast"], returns: "i64_fast" },
  vhostd_receive: { args: ["i32", "ptr", "i64_fast", "ptr", "ptr"], returns: "i64_fast" },
  vhostd_peek_message: { args: ["i32", "ptr", "i64_fast", "ptr", "ptr"], returns: "i64_fast" },
  vhostd_send: { args: ["i32", "ptr", "i64_fast", "ptr", "i32"], returns: "i64_fast" },
  vhostd_map: { args: ["i32", "i64_fast", "i64_fast", "i32"], returns: "i64_fast" },
  vhostd_unmap: { args: ["i64_fast", "i64_fast"], returns: "i32" },
  vhostd_disown: { args: ["i64_fast", "i64_fast"], returns: "i32" },
  vhostd_read8: { args: ["i64_fast"], returns: "i64_fast" },
  vhostd_read16: { args: ["i64_fast"], returns: "i64_fast" },
  vhostd_read32: { args: ["i64_fast"], returns: "i64_fast" },
  vhostd_write8: { args: ["i64_fast", "u32"], returns: "i32" },
  vhostd_write16: { args: ["i64_fast", "u32"], returns: "i32" },
  vhostd_write32: { args: ["i64_fast", "u32"], returns: "i32" },
  vhostd_log_mark: { args: ["i64_fast", "i64_fast", "i64_fast"], returns: "i32" },
  vhostd_log_merge_bitmap: { args: ["i64_fast", "ptr", "i64_fast"], returns: "i32" },
  vhostd_log_merge_bytemap: { args: ["i64_fast", "i64_fast", "ptr", "i64_fast"], returns: "i32" },
  vhostd_log_take_bytemap: { args: ["i64_fast", "i64_fast", "i64_fast", "i64_fast"], returns: "i32" },
  vhostd_log_count: { args: ["i64_fast", "i64_fast"], returns: "i64_fast" },
} as const;

/** Arguments and results as native/ has them; wrappers check them first, because the boundary converts silently. */
type Linked = {
  readonly [Name in keyof typeof SYMBOLS]: (...values: ArgumentsOf<(typeof SYMBOLS)[Name]["args"]>) => number | bigint;
};
type ArgumentsOf<Types extends readonly string[]> = {
  -readonly [Index in keyof Types]: Types[Index] extends "ptr" ? NodeJS.TypedArray : number;
};

/** The module beside a compiled executable: the one inside would be copied to /tmp at each start. */
function besideExecutable(): string | undefined {
  if (!import.meta.dir.startsWith("/$bunfs")) return undefined;
  const path = join(dirname(process.execPath), "vhostd.node");
  return existsSync(path) ? path : undefined;
}

function load(): Addon {
  const path = process.env["VFE_NATIVE"] ?? besideExecutable();
  // The literal path lets a compiled executable embed the module.
  return path === undefined ? require("../../native/build/vhostd.node") : require(path);
}

/** The native module; src/native is its only user. */
export const addon = load();

/** Links C functions whose addresses the module exports: one copy of the module, in a compiled executable too. */
function link(): Linked {
  const table = Object.entries(SYMBOLS).map(([name, types]) => {
    const address = addon.symbols[name];
    if (address === undefined) throw new Error(`native/build/vhostd.node has no ${name}: build it again`);
    return [name, { ...types, ptr: address }];
  });
  return linkSymbols(Object.fromEntries(table)).symbols as unknown as Linked;
}

/** The C functions of native/. */
export const c = link();

/**
 * The result of a native function as a number.
 * @param call what was called, for the error
 * @throws SystemError
 */
export function check(result: number | bigint, call: string): number {
  const value = Number(result);
  if (value < 0) throw new SystemError(call, -value);
  return value;
}
