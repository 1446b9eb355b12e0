import { expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Deadline } from "../../src/base/deadline.ts";
import { findAccelerator } from "../kit/guest/accelerator.ts";
import { Child } from "../kit/guest/child.ts";
import { Guest } from "../kit/guest/guest.ts";
import { buildGuestImage } from "../kit/guest/image.ts";
import { MOVERS } from "../kit/movers.ts";

/** The device class of examples/: both programs know it from their configuration only. */

const ROOT = join(import.meta.dir, "../..");
const PLUGIN = join(ROOT, "examples/plugin-rng/index.ts");
const START_TIMEOUT = 15_000;
/** Bytes that the guest reads from each device. */
const AMOUNT = 64 << 10;

/** An entropy device for each way to move a VF's state, each of a PF of its own. */
const DEVICES = MOVERS.map((way, index) => {
  const slot = `0000:5${"ab"[index]}:00`;
  return { ...way, pf: `${slot}.0`, vf: `${slot}.1`, socket: `rng${index}.sock` };
});

const SOFTVF = `plugins = ["${PLUGIN}"]
runtime-dir = "softvf"
${DEVICES.map(({ pf, migration }) => `[[pf]]\naddress = "${pf}"\nclass = "rng"\nmigration = "${migration}"\n`).join("")}`;

const VHOSTD = `plugins = ["${PLUGIN}"]
runtime-dir = "vhostd"
bus = ["softvf/devices"]
${DEVICES.map(({ pf }) => `[[pf]]\ndevice = "${pf}"\n`).join("")}
${DEVICES.map(({ vf, socket }) => `[[vf]]\ndevice = "${vf}"\nsocket = "${socket}"\nmode = "server"\n`).join("")}`;

function program(name: string): string[] {
  return [process.execPath, join(ROOT, "bin", `${name}.ts`)];
}

async function start(directory: string, name: string, configuration: string): Promise<Child> {
  const file = join(directory, `${name}.toml`);
  await writeFile(file, configuration);
  const child = new Child([...program(name), "--config", file], { name, log: join(directory, `${name}.log`) });
  try {
    await child.line(/^ready /m, START_TIMEOUT);
    return child;
  } catch (error) {
    await child[Symbol.asyncDispose]();
    throw error;
  }
}

interface VfInfo {
  readonly mover: string;
  /** A guest runs it. */
  readonly configured: boolean;
  readonly queue_stats: readonly { readonly completed: number; readonly bad: number; readonly bytes: number }[];
}

async function vfInfo(directory: string, vf: string): Promise<VfInfo> {
  const child = Bun.spawn([...program("vfe-vhost-cli"), "vf", "-i", vf], {
    env: { ...process.env, VFE_VHOSTD_RUNTIME_DIR: join(directory, "vhostd") },
    stdio: ["ignore", "pipe", "pipe"],
  });
  const [text, errors] = await Promise.all([child.stdout.text(), child.stderr.text(), child.exited]);
  if (child.exitCode !== 0) throw new Error(`vf -i ${vf}: ${errors}`);
  return JSON.parse(text).device;
}

/** QEMU offers its guest all that it has itself, whatever the back-end offers: queue_reset is not for us to have. */
function rngDevice(socket: string, index: number): string[] {
  return [
    ...["-chardev", `socket,id=rng${index},path=${socket}`],
    ...["-device", `vhost-user-rng-pci,chardev=rng${index},queue_reset=off`],
  ];
}

test("a Linux guest's /dev/hwrng reads through VFs of a class that is no part of this project", async () => {
  const image = await buildGuestImage();
  const accelerator = await findAccelerator(image);
  const directory = await mkdtemp(join(tmpdir(), "rng-"));
  await using cleanUp = new AsyncDisposableStack();
  cleanUp.defer(() => rm(directory, { recursive: true, force: true }));
  cleanUp.use(await start(directory, "vfe-softvf", SOFTVF));
  cleanUp.use(await start(directory, "vhostd", VHOSTD));
  // The daemon is ready before the devices of its configuration are.
  const deadline = Deadline.after(START_TIMEOUT, "sockets of the VFs");
  for (const { socket } of DEVICES) await deadline.poll(() => existsSync(join(directory, socket)) || undefined, 10);

  const guest = await Guest.boot({
    ...{ directory, name: "linux", accelerator, image, disks: [] },
    arguments: DEVICES.flatMap(({ socket }, index) => rngDevice(join(directory, socket), index)),
  });
  cleanUp.use(guest);

  for (const [index, { vf, mover }] of DEVICES.entries()) {
    await guest.run(`echo virtio_rng.${index} > /sys/class/misc/hw_random/rng_current`);
    expect(await guest.run("cat /sys/class/misc/hw_random/rng_current")).toBe(`virtio_rng.${index}`);
    const before = await vfInfo(directory, vf);
    expect(before).toMatchObject({ mover, configured: true });
    const text = await guest.run(`dd if=/dev/hwrng bs=${AMOUNT} count=1 iflag=fullblock 2> /dev/null | gzip | wc -c`);
    // What is random cannot be made smaller.
    expect(Number(text)).toBeGreaterThan(AMOUNT);
    const [queue] = (await vfInfo(directory, vf)).queue_stats;
    expect(queue!.bytes - before.queue_stats[0]!.bytes).toBeGreaterThanOrEqual(AMOUNT);
    expect(queue).toMatchObject({ bad: 0 });
  }

  // The guest comes up again, and its devices with it.
  guest.post("again", "reboot -f");
  await guest.booted(2);
  for (const [index, { vf }] of DEVICES.entries()) {
    const read = `echo virtio_rng.${index} > /sys/class/misc/hw_random/rng_current && head -c 32 /dev/hwrng | wc -c`;
    expect(await guest.run(read)).toBe("32");
    expect((await vfInfo(directory, vf)).configured).toBe(true);
  }
}, 120_000);
