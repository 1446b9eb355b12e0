import { tmpdir } from "node:os";
import { join } from "node:path";
import type { SoftOption, SoftOptionValue } from "../../../src/plugin.ts";
import { optionFlag } from "../../../src/softvf/class-options.ts";

/** One value for one option: of the right type, but hardly what it is made for. */
export interface OptionTrial {
  readonly option: string;
  readonly value: SoftOptionValue;
  /** For people: `slow=2147483648`. */
  readonly text: string;
}

const VALUES: Readonly<Record<SoftOption["type"], readonly SoftOptionValue[]>> = {
  number: [0, 1, 2, 3, 100, 65_536, 2 ** 31, Number.MAX_SAFE_INTEGER],
  size: [0, 1, 511, 512, 4096, 1 << 20, Number.MAX_SAFE_INTEGER],
  boolean: [false, true],
  string: ["", "x", "ü\n", "{}", "../..", "x".repeat(300)],
  path: ["/", "/dev/null", join(tmpdir(), "no-such-directory/no-such-file")],
};

/** Values as the host gives them to a class: parsed by type, otherwise unchecked. */
export function candidates(
  options: Readonly<Record<string, SoftOption>>,
  { live = false }: { readonly live?: boolean },
): OptionTrial[] {
  return Object.entries(options)
    .filter(([, option]) => !live || option.live === true)
    .flatMap(([option, { type }]) =>
      VALUES[type].map((value) => ({ option, value, text: `${optionFlag(option)}=${JSON.stringify(value)}` })),
    );
}
