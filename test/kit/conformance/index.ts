import { afterAll, beforeAll, describe, test } from "bun:test";
import { createRequire } from "node:module";
import { basename, dirname, isAbsolute } from "node:path";
import { Deadline } from "../../../src/base/deadline.ts";
import type { Plugin } from "../../../src/plugin.ts";
import { CLASS_CHECKS } from "./class-checks.ts";
import { FEATURE_CHECKS } from "./feature-checks.ts";
import { MESSAGE_CHECKS } from "./message-checks.ts";
import { SERVED_CHECKS } from "./served-checks.ts";
import { SOFT_DEVICE_CHECKS } from "./soft-device-checks.ts";
import { type Check, type ConformanceSubject, load } from "./subject.ts";
import { Watchdog } from "./watchdog.ts";

export type { Check, ConformanceSubject } from "./subject.ts";
export { load } from "./subject.ts";

/** Milliseconds for one check; those with processes take the longest. */
const CHECK_TIMEOUT = 50_000;
/** Until a thread that did not even see that is given up. */
const BLOCKED_TIMEOUT = CHECK_TIMEOUT + 5_000;
const TEST_TIMEOUT = CHECK_TIMEOUT + 10_000;

/** All that is demanded of a device class, cheapest first. */
export const CHECKS: readonly Check[] = [
  ...CLASS_CHECKS,
  ...FEATURE_CHECKS,
  ...MESSAGE_CHECKS,
  ...SOFT_DEVICE_CHECKS,
  ...SERVED_CHECKS,
];

/**
 * The conformance suite: registers a test for each thing that is demanded of a device class, alone, its software device in
 * vfe-softvf, and its VF in the daemon with our own front-end. To be called in a file that `bun test` runs.
 */
export function testDeviceClass(subject: ConformanceSubject): void {
  const title = `device class ${subject.className ?? classNames(subject.plugin)}`;
  describe(title, () => {
    let watchdog: Watchdog | undefined;
    beforeAll(async () => {
      watchdog = await Watchdog.start();
    });
    afterAll(() => watchdog?.[Symbol.dispose]());

    for (const { name, of, run } of CHECKS) {
      const body = async () => {
        const what = `${title}: the check "${name}"`;
        watchdog?.watch(what, BLOCKED_TIMEOUT);
        try {
          await Deadline.after(CHECK_TIMEOUT, what).race(load(subject).then(run));
        } finally {
          watchdog?.rest();
        }
      };
      if (of === "class" || subject.softvf !== undefined) test(name, body, TEST_TIMEOUT);
      else test.skip(`${name} [skip: no options for a software device are given (softvf)]`, body);
    }
  });
}

/** For a title, so nothing is wrong here: the first check says what is. */
function classNames(plugin: string): string {
  const names: string[] = [];
  try {
    const { default: candidate } = createRequire(import.meta.url)(plugin) as { readonly default: Plugin };
    candidate.setup({ deviceClass: ({ name }) => void names.push(name), adoption() {} });
  } catch {
    names.length = 0;
  }
  return names.join(", ") || (isAbsolute(plugin) ? basename(dirname(plugin)) : plugin);
}
