import { afterEach, expect } from "bun:test";
import { Deadline } from "../../../src/base/deadline.ts";
import { liveFds } from "../../../src/native/fd.ts";
import { FakeAdmin, type FakeAdminOptions } from "../../kit/fake-admin.ts";

/** What the tests of the admin queue have in common: devices made of registers, and no fd left when they are over. */

export const soon = (ms = 2000) => Deadline.after(ms, "the test");
/** Disposed of after the test, last first. */
export const undo: AsyncDisposable[] = [];

/** To be called once by each file. */
export function cleanUpAfterEach(): void {
  afterEach(async () => {
    for (const one of undo.splice(0).reverse()) await one[Symbol.asyncDispose]();
    expect(liveFds()).toBe(0);
  });
}

export function make(options: FakeAdminOptions = {}): FakeAdmin {
  const fake = new FakeAdmin(options);
  undo.push(fake);
  return fake;
}

export async function open(options: FakeAdminOptions = {}) {
  const fake = make(options);
  return { fake, admin: await fake.open() };
}

export async function until(condition: () => boolean): Promise<void> {
  await soon().poll(() => condition() || undefined, 1);
}
