import { expect, test } from "bun:test";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { dirname, join, normalize } from "node:path";

const ROOT = join(import.meta.dir, "../..");

/** What each folder of src/ may import of the others; files directly in src/ may be imported by all. */
const MAY_IMPORT: Readonly<Record<string, readonly string[]>> = {
  base: [],
  native: ["base"],
  "vfio-user": ["native", "base"],
  pci: ["vfio-user", "native", "base"],
  virtio: ["pci", "native", "base"],
  "vhost-user": ["virtio", "pci", "native", "base"],
  systemd: ["native", "base"],
  keeper: ["systemd", "native", "base"],
  rpc: ["base"],
  machine: ["pci", "base"],
  cli: ["machine", "pci", "rpc", "base"],
  daemon: ["vhost-user", "virtio", "pci", "keeper", "systemd", "rpc", "native", "base"],
  softvf: ["virtio", "pci", "vfio-user", "systemd", "rpc", "native", "base"],
};

function sources(folder: string): string[] {
  return readdirSync(join(ROOT, folder), { recursive: true, encoding: "utf8" })
    .filter((path) => path.endsWith(".ts"))
    .map((path) => join(folder, path));
}

/** Paths from the root of the project that a file imports. */
function imports(path: string): string[] {
  const text = readFileSync(join(ROOT, path), "utf8");
  return [...text.matchAll(/(?:from|import\()\s*"(\.[^"]+)"/g)].map(([, target]) =>
    normalize(join(dirname(path), target!)),
  );
}

test("arrows between the folders of src/ point downwards only", () => {
  const wrong: string[] = [];
  for (const path of sources("src")) {
    const [, folder = ""] = path.split("/");
    for (const target of imports(path)) {
      const [top, to = "", ...rest] = target.split("/");
      const allowed =
        top === "src" && (rest.length === 0 || to === folder || MAY_IMPORT[folder]?.includes(to) === true);
      const atTop = path.split("/").length === 2;
      if (!allowed && !atTop) wrong.push(`${path} imports ${target}`);
    }
  }
  expect(wrong).toEqual([]);
});

test("what works without a daemon takes of src/pci/ only what reads /sys and /proc", () => {
  const light = ["address.ts", "bus.ts", "vfio/group-neighbours.ts", "vfio/holders.ts"].map(
    (name) => `src/pci/${name}`,
  );
  const wrong = [...sources("src/machine"), ...sources("src/cli")].flatMap((path) =>
    imports(path).filter((target) => target.startsWith("src/pci/") && !light.includes(target)),
  );
  expect(wrong).toEqual([]);
});

test("nothing in src/ or bin/ knows a device class by name", () => {
  const classes = readdirSync(join(ROOT, "plugins")).filter((name) =>
    existsSync(join(ROOT, "plugins", name, "config-space.ts")),
  );
  expect(classes).toContain("blk");
  const names = new RegExp(`"(${classes.join("|")})"|plugins/(${classes.join("|")})`);
  const knowing = [...sources("src"), ...sources("bin")].filter((path) =>
    names.test(readFileSync(join(ROOT, path), "utf8")),
  );
  expect(knowing).toEqual([]);
});

test("a plugin imports nothing of the host but types", () => {
  const wrong = sources("plugins").filter((path) => {
    const text = readFileSync(join(ROOT, path), "utf8");
    return (
      imports(path).some((target) => !target.startsWith("plugins/")) || /^import (?!type)[^;]*"vfe-vhostd/m.test(text)
    );
  });
  expect(wrong).toEqual([]);
});

test("no test waits in an event loop of its own (test/kit/rejection.ts says why)", () => {
  const waiting = sources("test").filter((path) =>
    /\.(rejects|resolves)\b/.test(readFileSync(join(ROOT, path), "utf8")),
  );
  expect(waiting).toEqual([]);
});
