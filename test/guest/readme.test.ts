import { expect, test } from "bun:test";
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { findAccelerator } from "../kit/guest/accelerator.ts";
import { imageChecksum } from "../kit/guest/disk-checks.ts";
import { commandChannel } from "../kit/guest/guest.ts";
import { buildGuestImage } from "../kit/guest/image.ts";
import { LineServer } from "../kit/guest/line-server.ts";
import { Terminal } from "../kit/guest/terminal.ts";

const ROOT = join(import.meta.dir, "../..");
const START_TIMEOUT = 15_000;
const GUEST_TIMEOUT = 60_000;
const MIB = 2 ** 20;

interface Step {
  readonly command: string;
  /** What the README shows below it; empty where it shows nothing. */
  readonly shown: string;
}

/** The walk-through of the README: what follows each "$ ", over all its lines. */
async function walkThrough(): Promise<Step[]> {
  const readme = await readFile(join(ROOT, "README.md"), "utf8");
  const chapter = readme.slice(readme.indexOf("## Walk through it by hand"));
  const block = /```console\n([\s\S]*?)```/.exec(chapter)?.[1] ?? "";
  const steps = block.matchAll(/^\$ ((?:.*\\\n)*.*)\n((?:[^$#\n].*\n)*)/gm);
  return [...steps].map(([, command = "", shown = ""]) => ({ command, shown: words(shown) }));
}

/** Columns are as wide as the terminal, so only the words count. */
function words(text: string): string {
  return text.trim().split(/\s+/).join(" ");
}

/** Gives a script to the guest that has this channel when it is up. The answer is "CODE OUTPUT". */
async function guestScript(path: string, script: string) {
  const answer = Promise.withResolvers<string>();
  const channel = await LineServer.listen(path, (line) => {
    const [id, code, output = ""] = line.split(" ");
    // Not before: what is written while the driver looks for the port is lost.
    if (id === "ready") channel.send(`script ${Buffer.from(script).toString("base64")}`);
    if (id === "script") answer.resolve(`${code} ${Buffer.from(output, "base64")}`);
  });
  return { answer: answer.promise, [Symbol.dispose]: () => channel[Symbol.dispose]() };
}

test("the walk-through of the README works as it is written", async () => {
  const steps = await walkThrough();
  // A README whose walk-through is written in another way must not pass as an empty one.
  expect(steps.length).toBeGreaterThan(8);
  expect(steps.filter(({ command }) => command.startsWith("qemu-system-x86_64 "))).toHaveLength(1);

  const image = await buildGuestImage();
  const accelerator = await findAccelerator(image);
  const home = await mkdtemp(join(tmpdir(), "r-"));
  try {
    await using terminal = new Terminal(ROOT);
    await terminal.run(`export TMPDIR=${home}`);
    for (const { command, shown } of steps) {
      if (command.startsWith("qemu-system-x86_64 ")) {
        await runGuest(terminal, command, { home, accelerator, ...image });
        continue;
      }
      const start = terminal.output.length;
      const { code, output } = await terminal.run(command);
      if (code !== 0) throw new Error(`${command}: ended with ${code}\n${output}`);
      if (command.endsWith("&")) await terminal.waitFor(/^ready /m, `ready: ${command}`, START_TIMEOUT, start);
      if (shown !== "") expect(words(output)).toBe(shown);
    }
  } finally {
    await rm(home, { recursive: true, force: true });
  }
}, 180_000);

interface GuestParts {
  readonly home: string;
  readonly accelerator: string;
  readonly kernel: string;
  readonly initramfs: string;
}

/** The README's QEMU, its "…" filled with a guest that writes to its disk, says what it wrote and ends. */
async function runGuest(terminal: Terminal, command: string, { home, accelerator, kernel, initramfs }: GuestParts) {
  const path = join(home, "channel");
  const script = `dd if=/dev/urandom of=/tmp/a bs=1M count=1 2> /dev/null
    dd if=/tmp/a of=/dev/vda bs=1M seek=7 oflag=direct 2> /dev/null && sha256sum < /tmp/a; (sleep 1; reboot -f) &`;
  using guest = await guestScript(path, script);
  const rest = [
    ...["-accel", accelerator, "-cpu", "max", "-no-reboot", ...commandChannel(path)],
    ...["-kernel", kernel, "-initrd", initramfs],
    ...["-append", "'console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check'"],
    // Its console would take what is typed next.
    "< /dev/null",
  ];
  expect(command).toEndWith("…");
  const directory = (await terminal.run("echo $D")).output.trim();
  const { code, output } = await terminal.run(command.replace("…", rest.join(" ")), GUEST_TIMEOUT);
  if (code !== 0) throw new Error(`QEMU ended with ${code}\n${output}`);
  const answer = await guest.answer;
  expect(answer).toMatch(/^0 [0-9a-f]{64}/);
  expect(await imageChecksum(join(directory, "disk.img"), 7 * MIB, MIB)).toBe(answer.slice(2, 66));
}
