import { expect, test } from "bun:test";
import { basename, join } from "node:path";
import { DEFAULT_STATE_DIRECTORY } from "../../../src/daemon/config.ts";
import { DEFAULT_RUNTIME_DIRECTORY } from "../../../src/runtime-directory.ts";

const ROOT = join(import.meta.dir, "../../..");

test("the daemon's unit has the limits that the doctor asks for, and the daemon's own directories", async () => {
  const lines = (await Bun.file(join(ROOT, "tools/package/units/vfe-vhostd.service")).text()).split("\n");
  expect(lines).toContain("LimitMEMLOCK=infinity");
  expect(lines).toContain("LimitNOFILE=1048576");
  expect(lines).toContain(`RuntimeDirectory=${basename(DEFAULT_RUNTIME_DIRECTORY)}`);
  expect(lines).toContain(`StateDirectory=${basename(DEFAULT_STATE_DIRECTORY)}`);
});

test("what the manual adds to it gives functions to vfio-pci, then has their VFs made", async () => {
  const [, section = ""] = (await Bun.file(join(ROOT, "docs/machine.md")).text()).split("## At each boot");
  const [, unit = ""] = /```ini\n(.*?)```/s.exec(section) ?? [];
  const before = unit.split("\n").filter((line) => line.startsWith("ExecStartPre="));
  expect(before.map((line) => /vfe-vhost-cli (\S+) af:00\.2/.exec(line)?.[1])).toEqual(["bind", "sriov"]);
});
