import { expect, test } from "bun:test";
import { VhostdError } from "../../../src/base/errors.ts";
import { createLogger } from "../../../src/base/log.ts";

/** What a logger writes to standard error while `act` runs. */
function captured(act: () => void): string {
  const write = process.stderr.write;
  let text = "";
  process.stderr.write = ((chunk: string) => {
    text += chunk;
    return true;
  }) as typeof process.stderr.write;
  try {
    act();
  } finally {
    process.stderr.write = write;
  }
  return text;
}

test("a line names its subject and the chain of causes", () => {
  const cause = new VhostdError("io", "the server closed its socket");
  const text = captured(() => {
    createLogger("info", false)
      .child("vf 0000:5a:00.1")
      .error("session ended", new VhostdError("protocol", "bad header", { cause }));
  });
  expect(text).toContain("vf 0000:5a:00.1: session ended: bad header (the server closed its socket)\n");
});

test("a peer's text cannot forge a line", () => {
  const text = captured(() => createLogger("info", false).info("name: x\n<0>forged\u001b[31m"));
  expect(text.match(/\n/g)).toHaveLength(1);
  expect(text).not.toContain("\u001b");
});

test("journald gets its priority, and levels below the one asked for are silent", () => {
  const text = captured(() => {
    const log = createLogger("warn", true);
    log.info("not shown");
    log.warn("shown");
  });
  expect(text).toBe("<4>shown\n");
});
