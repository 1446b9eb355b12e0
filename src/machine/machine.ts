import { execFile } from "node:child_process";
import { constants } from "node:fs";
import { open, readdir, readFile, readlink, realpath } from "node:fs/promises";
import { basename, join, relative, sep } from "node:path";
import { promisify } from "node:util";
import { Deadline } from "../base/deadline.ts";
import { SystemError, VhostdError } from "../base/errors.ts";

/** What changes a machine, or asks its kernel more than files tell. */
export interface Effects {
  /** @param path below the root directory */
  write(path: string, text: string): Promise<void>;
  /** @returns what it printed */
  run(command: readonly string[]): Promise<string>;
  /**
   * Nobody else can have the file now: a block device that is mounted in whichever namespace, swap, part of dm, md, ZFS; an
   * IOMMU group that VFIO has given to a process.
   */
  isClaimed(path: string): Promise<boolean>;
}

/** A function's driver is told to let go, or a PF's firmware makes many VFs: seconds at worst, milliseconds. */
const CHANGE_TIME = 60_000;
const COMMAND_TIME = 30_000;
const EBUSY = 16;

/**
 * The files in which this machine's kernel tells of itself: /sys, /proc, /dev, /etc below one root directory. What is not
 * there, or may not be read, is undefined; nothing is remembered.
 */
export class Machine {
  constructor(
    readonly root = "/",
    private readonly effects: Effects = new SystemEffects(root),
  ) {}

  /** Where a path of the machine is read. */
  at(path: string): string {
    return join(this.root, path);
  }

  /** The text of a file without the space around it. */
  async text(path: string): Promise<string | undefined> {
    return (await this.bytes(path))?.toString("utf8").trim();
  }

  async bytes(path: string): Promise<Buffer | undefined> {
    return await readFile(this.at(path)).catch(() => undefined);
  }

  /** A decimal number, or one with 0x before it. */
  async number(path: string): Promise<number | undefined> {
    const text = await this.text(path);
    return text !== undefined && /^(-?\d+|0x[0-9a-f]+)$/i.test(text) ? Number(text) : undefined;
  }

  /** Lines of a file, none where it is not there. */
  async lines(path: string): Promise<string[]> {
    return ((await this.text(path)) ?? "").split("\n").filter((line) => line !== "");
  }

  /** Names in a directory, none where it is not there. */
  async names(path: string): Promise<string[]> {
    return (await readdir(this.at(path)).catch(() => [])).sort();
  }

  /** What a link says, word for word. */
  async link(path: string): Promise<string | undefined> {
    return await readlink(this.at(path)).catch(() => undefined);
  }

  /** The last part of what a link says. */
  async linkName(path: string): Promise<string | undefined> {
    const target = await this.link(path);
    return target === undefined ? undefined : basename(target);
  }

  /** The path after all links were followed, as the machine names it. */
  async resolve(path: string): Promise<string | undefined> {
    const [root, found] = await Promise.all([realpath(this.root), realpath(this.at(path)).catch(() => undefined)]);
    return found === undefined ? undefined : join("/", relative(root, found));
  }

  async exists(path: string): Promise<boolean> {
    return (await this.resolve(path)) !== undefined;
  }

  /** Those of a directory's links that lead below `ancestor`, a resolved path. */
  async linksBelow(directory: string, ancestor: string): Promise<string[]> {
    const names = await this.names(directory);
    const targets = await Promise.all(names.map((name) => this.resolve(join(directory, name))));
    return names.filter((_, index) => targets[index]?.startsWith(ancestor + sep) === true);
  }

  /** @throws SystemError; VhostdError timedOut, where the kernel goes on waiting */
  async write(path: string, text: string): Promise<void> {
    await Deadline.after(CHANGE_TIME, `writing ${JSON.stringify(text)} to ${path}`).race(
      this.effects.write(path, text),
    );
  }

  /** @throws VhostdError io */
  async run(command: readonly string[]): Promise<string> {
    return await this.effects.run(command);
  }

  async isClaimed(path: string): Promise<boolean> {
    return await this.effects.isClaimed(path);
  }
}

/** Effects on the machine that this process runs on. */
class SystemEffects implements Effects {
  constructor(private readonly root: string) {}

  async write(path: string, text: string): Promise<void> {
    try {
      // Attributes that can only be written refuse to be opened for more, and are never to be made.
      const file = await open(join(this.root, path), constants.O_WRONLY | constants.O_TRUNC);
      try {
        await file.write(text);
      } finally {
        await file.close();
      }
    } catch (cause) {
      throw new SystemError(`write ${JSON.stringify(text)} to ${path}`, errnoOf(cause), { cause });
    }
  }

  async run(command: readonly string[]): Promise<string> {
    const [program = "", ...args] = command;
    try {
      return (await promisify(execFile)(program, args, { timeout: COMMAND_TIME })).stdout;
    } catch (cause) {
      const said = cause instanceof Error && "stderr" in cause ? String(cause.stderr).trim() : "";
      throw new VhostdError("io", `${command.join(" ")} failed${said === "" ? "" : `: ${said}`}`, { cause });
    }
  }

  async isClaimed(path: string): Promise<boolean> {
    try {
      // O_EXCL without O_CREAT: EBUSY where the kernel itself has a block device (open(2)).
      const file = await open(join(this.root, path), constants.O_RDONLY | constants.O_EXCL);
      await file.close();
      return false;
    } catch (error) {
      return errnoOf(error) === EBUSY;
    }
  }
}

/** Positive. */
function errnoOf(error: unknown): number {
  return error instanceof Error && "errno" in error && typeof error.errno === "number" ? Math.abs(error.errno) : 5;
}
