import { expect, test } from "bun:test";
import { basename, join } from "node:path";
import { DEFAULT_STATE_DIRECTORY } from "../../../src/daemon/config.ts";
import { DEFAULT_RUNTIME_DIRECTORY } from "../../../src/runtime-directory.ts";

const MANUAL = join(import.meta.dir, "../../../docs/machine.md");

test("the sample unit has the limits that the doctor asks for, and the daemon's own directories", async () => {
  const [, section = ""] = (await Bun.file(MANUAL).text()).split("## At each boot");
  const [, unit = ""] = /```ini\n(.*?)```/s.exec(section) ?? [];
  const lines = unit.split("\n");
  expect(lines).toContain("LimitMEMLOCK=infinity");
  expect(lines).toContain("LimitNOFILE=1048576");
  expect(lines).toContain(`RuntimeDirectory=${basename(DEFAULT_RUNTIME_DIRECTORY)}`);
  expect(lines).toContain(`StateDirectory=${basename(DEFAULT_STATE_DIRECTORY)}`);
  const before = lines.filter((line) => line.startsWith("ExecStartPre="));
  expect(before.map((line) => /vfe-vhost-cli (\S+) af:00\.2/.exec(line)?.[1])).toEqual(["bind", "sriov"]);
});
