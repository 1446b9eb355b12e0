import { expect, test } from "bun:test";
import { parseVfOptions, parseVfRecord, RECORD_VERSION } from "../../../src/daemon/record.ts";

const parts = { function: null, dataPath: null, session: null, rings: null, link: null };
const place = { address: "0000:5a:00.1", socket: "/tmp/vm", mode: "server" };

function record(options: Record<string, string | boolean>) {
  return parseVfRecord({ version: RECORD_VERSION, options: { ...place, ...options }, ...parts });
}

test("what the operator said of a VF survives the daemon", () => {
  const options = { unmanaged: true, hostNotifier: false, frontend: "nvidia-presetup" };
  expect(parseVfOptions(record(options).options) as unknown).toEqual({ ...place, ...options });
  expect(parseVfOptions(record({}).options) as unknown).toEqual(place);
});

test("a kind of front-end that this daemon does not know is refused", () => {
  expect(() => record({ frontend: "other" })).toThrow("frontend");
});
