import { fieldSize } from "../../../src/base/layout.ts";
import type { DeviceClass } from "../../../src/plugin.ts";

/** Offsets of the bytes that a front-end, and so its driver, may write. */
export function writableBytes({ configSpace, writableConfig = [] }: DeviceClass): Set<number> {
  return new Set(
    writableConfig.flatMap((name) => {
      const [offset, type] = configSpace[name]!;
      return Array.from({ length: fieldSize(type) }, (_, at) => offset + at);
    }),
  );
}
