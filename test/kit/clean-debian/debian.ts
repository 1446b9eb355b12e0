import { mkdir, mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Deadline } from "../../../src/base/deadline.ts";
import { output } from "../debian.ts";
import { Child } from "../guest/child.ts";

const BOOT = join(import.meta.dir, "boot.sh");
const BOOT_TIMEOUT = 60_000;

/** What a command came to. */
interface Outcome {
  readonly code: number;
  /** Standard output and standard error. */
  readonly text: string;
}

/**
 * A Debian of its own, in a directory: commands run in it as they do while an image is built, or, when it was booted, by its
 * own systemd in namespaces and a control group that nobody else is in. It shares the kernel, and no network.
 */
export class Debian implements AsyncDisposable {
  private init: number | undefined;

  private constructor(
    /** Its root, as seen from outside. */
    readonly root: string,
    private readonly directory: string,
    private readonly stack: AsyncDisposableStack,
  ) {}

  /** @param archive of findDebian() */
  static async unpack(archive: string): Promise<Debian> {
    await using undo = new AsyncDisposableStack();
    const directory = await mkdtemp(join(tmpdir(), "debian-"));
    undo.defer(() => rm(directory, { recursive: true, force: true }));
    const root = join(directory, "root");
    await mkdir(root);
    await output(["tar", "--extract", "--file", archive, "--directory", root, "--numeric-owner"]);
    return new Debian(root, directory, undo.move());
  }

  /** Starts its systemd, and waits until all that is enabled was started, or has failed to. */
  async boot(): Promise<void> {
    const group = `vhostd-test-${process.pid}`;
    const program = new Child(["unshare", "--mount", "sh", BOOT, this.root, group], {
      name: "the Debian",
      log: join(this.directory, "boot.log"),
    });
    this.stack.defer(async () => {
      await program.kill();
      await removeGroup(group);
    });
    const deadline = Deadline.after(BOOT_TIMEOUT, "the boot of the Debian");
    this.init = await deadline.poll(async () => {
      if (!program.running) throw new Error(`the Debian does not boot: ${program.tail()}`);
      return await findInit(program.pid);
    }, 20);
    await deadline.poll(async () => {
      const { text } = await this.try("systemctl", "is-system-running");
      return /^(running|degraded)$/m.test(text) || undefined;
    }, 100);
  }

  /** @returns what it wrote, standard error too @throws Error when it fails */
  async run(...command: readonly string[]): Promise<string> {
    const { code, text } = await this.try(...command);
    if (code !== 0) throw new Error(`${command.join(" ")} ended with ${code}: ${text.trim()}`);
    return text.trim();
  }

  /** The same for a command that may fail. */
  async try(...command: readonly string[]): Promise<Outcome> {
    const enter =
      this.init === undefined
        ? ["unshare", "--mount", "sh", "-c", 'mount -t proc proc "$0/proc" && exec chroot "$0" "$@"', this.root]
        : ["nsenter", "--target", `${this.init}`, "--mount", "--uts", "--ipc", "--net", "--pid"];
    const child = Bun.spawn([...enter, "sh", "-c", 'exec "$@" 2>&1', "sh", ...command], {
      stdio: ["ignore", "pipe", "inherit"],
      env: { PATH: "/usr/sbin:/usr/bin:/sbin:/bin", LC_ALL: "C", DEBIAN_FRONTEND: "noninteractive" },
    });
    const [text, code] = await Promise.all([child.stdout.text(), child.exited]);
    return { code, text };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stack.disposeAsync();
  }
}

/** Its process 1, when that is what it will be: before, a command would run in our own root. */
async function findInit(pid: number): Promise<number | undefined> {
  const children = await readFile(`/proc/${pid}/task/${pid}/children`, "utf8").catch(() => "");
  const init = Number(children.trim());
  const name = await readFile(`/proc/${init}/comm`, "utf8").catch(() => "");
  return name === "systemd\n" ? init : undefined;
}

/** Empty by now; the kernel may still be at it. */
async function removeGroup(group: string): Promise<void> {
  const remove = `mount -t cgroup2 cgroup2 /mnt && ! find /mnt/${group} -depth -type d -exec rmdir {} + 2>&1 | grep .`;
  await Deadline.after(5_000, `the end of the control group ${group}`).poll(async () => {
    const child = Bun.spawn(["unshare", "--mount", "sh", "-c", remove], { stdio: ["ignore", "ignore", "ignore"] });
    return (await child.exited) === 0 || undefined;
  }, 50);
}
