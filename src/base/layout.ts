/**
 * Wire structures and register blocks as tables: name, offset, type. All integers are little-endian. Reading and
 * writing derive from the table; sizes are checked when the module loads.
 */

const SIZES = { u8: 1, u16: 2, u32: 4, u64: 8, addr: 8 } as const;

/** `u64` is a bigint; `addr` is a u64 that holds an address, offset or size and must fit a safe integer. */
export type FieldType = keyof typeof SIZES;

type ValueOf<T extends FieldType> = T extends "u64" ? bigint : number;
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
  const view = (bytes: Uint8Array, at: number) => {
    if (at < 0 || at + size > bytes.byteLength) {
      throw new RangeError(`${name} needs ${size} bytes at ${at}, there are ${bytes.byteLength}`);
    }
    return new DataView(bytes.buffer, bytes.byteOffset + at, size);
  };
  const write = (bytes: Uint8Array, value: Partial<StructValue<F>>, at = 0) => {
    const data = view(bytes, at);
    for (const [field, [offset, type]] of entries) {
      writeField(data, offset, type, (value as Record<string, number | bigint>)[field] ?? 0);
    }
  };
  return {
    name,
    size,
    fields,
    read(bytes, at = 0) {
      const data = view(bytes, at);
      const value: Record<string, number | bigint> = {};
      for (const [field, [offset, type]] of entries) value[field] = readField(data, offset, type);
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

/** @throws RangeError where an `addr` exceeds 2^53 - 1 */
export function readField(data: DataView, offset: number, type: FieldType): number | bigint {
  switch (type) {
    case "u8":
      return data.getUint8(offset);
    case "u16":
      return data.getUint16(offset, true);
    case "u32":
      return data.getUint32(offset, true);
    case "u64":
      return data.getBigUint64(offset, true);
    case "addr": {
      const value = data.getBigUint64(offset, true);
      if (value > BigInt(Number.MAX_SAFE_INTEGER))
        throw new RangeError(`address 0x${value.toString(16)} is beyond 2^53`);
      return Number(value);
    }
  }
}

function writeField(data: DataView, offset: number, type: FieldType, value: number | bigint): void {
  switch (type) {
    case "u8":
      data.setUint8(offset, Number(value));
      break;
    case "u16":
      data.setUint16(offset, Number(value), true);
      break;
    case "u32":
      data.setUint32(offset, Number(value), true);
      break;
    case "u64":
    case "addr":
      data.setBigUint64(offset, BigInt(value), true);
      break;
  }
}
