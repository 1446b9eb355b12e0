/**
 * Wire structures and register blocks as tables: name, offset, type. All integers are little-endian. Reading and
 * writing derive from the table; sizes are checked when the module loads.
 */

const SIZES = { u8: 1, u16: 2, u32: 4, u48: 6, u64: 8, addr: 8 } as const;

/** `u48` and `u64` are bigints; `addr` is a u64 that holds an address, offset or size and must fit a safe integer. */
export type FieldType = keyof typeof SIZES;

type ValueOf<T extends FieldType> = T extends "u48" | "u64" ? bigint : number;
type Fields = Readonly<Record<string, readonly [offset: number, type: FieldType]>>;

/** The values of a structure, by field name. */
export type StructValue<F extends Fields> = { [K in keyof F]: ValueOf<F[K][1]> };

export function fieldSize(type: FieldType): number {
  return SIZES[type];
}

export interface Struct<F extends Fields> {
  readonly name: string;
  /** Bytes. */
  readonly size: number;
  readonly fields: F;
  /** @throws RangeError where `bytes` is too short, or an `addr` does not fit */
  read(bytes: Uint8Array, at?: number): StructValue<F>;
  /** Fields that are left out are written as 0. */
  write(bytes: Uint8Array, value: Partial<StructValue<F>>, at?: number): void;
  encode(value: Partial<StructValue<F>>): Uint8Array<ArrayBuffer>;
}

/**
 * Declares a structure.
 * @param size bytes; must cover every field
 * @throws Error at load where a field lies outside or two fields overlap
 */
export function struct<const F extends Fields>(name: string, size: number, fields: F): Struct<F> {
  const taken = new Uint8Array(size);
  for (const [field, [offset, type]] of Object.entries(fields)) {
    for (let byte = offset; byte < offset + SIZES[type]; byte++) {
      if (byte >= size || taken[byte] === 1) throw new Error(`${name}.${field} overlaps or lies outside ${size} bytes`);
      taken[byte] = 1;
    }
  }
  const entries = Object.entries(fields);
  const check = (bytes: Uint8Array, at: number) => {
    if (at < 0 || at + size > bytes.byteLength) {
      throw new RangeError(`${name} needs ${size} bytes at ${at}, there are ${bytes.byteLength}`);
    }
  };
  const write = (bytes: Uint8Array, value: Partial<StructValue<F>>, at = 0) => {
    check(bytes, at);
    for (const [field, [offset, type]] of entries) {
      writeField(bytes, at + offset, type, (value as Record<string, number | bigint>)[field] ?? 0);
    }
  };
  return {
    name,
    size,
    fields,
    read(bytes, at = 0) {
      check(bytes, at);
      const value: Record<string, number | bigint> = {};
      for (const [field, [offset, type]] of entries) value[field] = readField(bytes, at + offset, type);
      return value as StructValue<F>;
    },
    write,
    encode(value) {
      const bytes = new Uint8Array(size);
      write(bytes, value);
      return bytes;
    },
  };
}

/*
 * Byte by byte rather than by a DataView: that takes an ArrayBuffer to be made for each message, far more than the
 * message itself.
 */

const TWO_TO_32 = 2 ** 32;

/** @throws RangeError where an `addr` exceeds 2^53 - 1 */
export function readField(bytes: Uint8Array, offset: number, type: FieldType): number | bigint {
  switch (type) {
    case "u8":
      return bytes[offset]!;
    case "u16":
      return bytes[offset]! | (bytes[offset + 1]! << 8);
    case "u32":
      return readU32(bytes, offset);
    case "u48":
      return (BigInt(bytes[offset + 4]! | (bytes[offset + 5]! << 8)) << 32n) | BigInt(readU32(bytes, offset));
    case "u64":
      return (BigInt(readU32(bytes, offset + 4)) << 32n) | BigInt(readU32(bytes, offset));
    case "addr": {
      const low = readU32(bytes, offset);
      const high = readU32(bytes, offset + 4);
      const value = high * TWO_TO_32 + low;
      if (value <= Number.MAX_SAFE_INTEGER) return value;
      const digits = high.toString(16) + low.toString(16).padStart(8, "0");
      throw new RangeError(`address 0x${digits} is beyond 2^53`);
    }
  }
}

function readU32(bytes: Uint8Array, offset: number): number {
  const high = (bytes[offset + 2]! << 16) | (bytes[offset + 3]! << 24);
  return (bytes[offset]! | (bytes[offset + 1]! << 8) | high) >>> 0;
}

function writeField(bytes: Uint8Array, offset: number, type: FieldType, value: number | bigint): void {
  const size = SIZES[type];
  if (size > 4) {
    const whole = BigInt.asUintN(64, BigInt(value));
    writeNumber(bytes, offset, 4, Number(whole & 0xffff_ffffn));
    writeNumber(bytes, offset + 4, size - 4, Number(whole >> 32n));
  } else {
    writeNumber(bytes, offset, size, Number(value));
  }
}

function writeNumber(bytes: Uint8Array, offset: number, size: number, value: number): void {
  for (let byte = 0; byte < size; byte++) bytes[offset + byte] = value >>> (8 * byte);
}
