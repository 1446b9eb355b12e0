import { readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { Deadline } from "../../../src/base/deadline.ts";
import { Child } from "./child.ts";
import { type ArchiveEntry, cpioArchive } from "./cpio.ts";
import type { Guest } from "./guest.ts";
import type { GuestImage } from "./image.ts";
import { addProgram } from "./initramfs-parts.ts";

const SOURCE = join(import.meta.dir, "guest-load.c");
const END_TIMEOUT = 60_000;
const LOOK_INTERVAL = 100;

/** Compiles guest-load.c. @returns where the program is */
export async function buildGuestLoad(directory: string): Promise<string> {
  const program = join(directory, "guest-load");
  await Bun.$`gcc -O2 -Wall -Wextra -Werror -pthread -o ${program} ${SOURCE}`.quiet();
  return program;
}

/** The image with the program in it. The kernel unpacks archives that stand one behind the other. */
export async function withGuestLoad(image: GuestImage, program: string, directory: string): Promise<GuestImage> {
  const entries = new Map<string, ArchiveEntry>();
  await addProgram(entries, program, "bin/guest-load");
  const initramfs = join(directory, "initramfs");
  await writeFile(initramfs, Buffer.concat([await readFile(image.initramfs), cpioArchive(entries)]));
  return { ...image, initramfs };
}

/** What a task says of itself: its counts by name. */
export interface TaskStatus {
  readonly text: string;
  readonly done: boolean;
  count(name: string): number;
}

/** @throws Error where the task says that something is wrong */
function parseStatus(task: string, line: string): TaskStatus {
  const text = line.trim();
  if (text === "" || text.startsWith("failed")) throw new Error(`${task} ${text === "" ? "did not begin" : text}`);
  return {
    text,
    done: text.endsWith(" done"),
    count: (name) => Number(new RegExp(`\\b${name} (\\d+)`).exec(text)?.[1] ?? 0),
  };
}

/** Where guest-load runs: the guest, wherever it is now, or this machine. A task is known by its name. */
export interface LoadPlace {
  /** @param words of guest-load: what it does, and everything but the status file */
  start(task: string, words: readonly string[]): Promise<void>;
  /** @throws Error where something is wrong */
  statuses(tasks: readonly string[]): Promise<TaskStatus[]>;
  /** SIGTERM: the task ends its work in its own time. */
  stop(task: string): Promise<void>;
}

export class GuestPlace implements LoadPlace {
  constructor(private readonly guest: () => Guest) {}

  async start(task: string, [what = "", ...words]: readonly string[]): Promise<void> {
    await this.guest().run(`guest-load ${what} /tmp/load.${task} ${words.join(" ")} > /tmp/load.${task}.log 2>&1 &
      echo $! > /tmp/load.${task}.pid`);
  }

  async statuses(tasks: readonly string[]): Promise<TaskStatus[]> {
    if (tasks.length === 0) return [];
    const script = `for task in ${tasks.join(" ")}; do
        kill -0 $(cat /tmp/load.$task.pid) 2> /dev/null; gone=$?
        state=$(cat /tmp/load.$task 2> /dev/null)
        [ $gone = 0 ] || case "$state" in *done*|failed*) ;; *) state="failed: it is gone"; esac
        echo "$\{state:-begins}"
      done`;
    const lines = (await this.guest().run(script)).split("\n");
    return tasks.map((task, index) => parseStatus(`${task} in the guest`, lines[index] ?? ""));
  }

  async stop(task: string): Promise<void> {
    await this.guest().run(`kill $(cat /tmp/load.${task}.pid) 2> /dev/null; true`);
  }
}

/** Processes of this machine, with some words in front, such as those of a network namespace. */
export class LocalPlace implements LoadPlace, AsyncDisposable {
  private readonly tasks = new Map<string, Child>();

  constructor(
    private readonly program: string,
    private readonly directory: string,
    private readonly prefix: readonly string[],
  ) {}

  async start(task: string, [what = "", ...words]: readonly string[]): Promise<void> {
    // An earlier task of that name has left what it said last.
    await rm(this.statusFile(task), { force: true });
    const command = [...this.prefix, this.program, what, this.statusFile(task), ...words];
    this.tasks.set(task, new Child(command, { name: task, log: join(this.directory, `${task}.log`) }));
  }

  async statuses(tasks: readonly string[]): Promise<TaskStatus[]> {
    return Promise.all(
      tasks.map(async (task) => {
        const file = Bun.file(this.statusFile(task));
        const text = (await file.exists()) ? await file.text() : "";
        return parseStatus(`${task} outside`, text === "" && this.tasks.get(task)?.running ? "begins" : text);
      }),
    );
  }

  async stop(task: string): Promise<void> {
    this.tasks.get(task)?.signal("SIGTERM");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all([...this.tasks.values()].map((task) => task.kill()));
  }

  private statusFile(task: string): string {
    return join(this.directory, `${task}.status`);
  }
}

/** Waits for the end of tasks. @returns their last words @throws Error where something was wrong */
export async function finished(
  place: LoadPlace,
  tasks: readonly string[],
  timeout = END_TIMEOUT,
): Promise<TaskStatus[]> {
  return await Deadline.after(timeout, `the end of ${tasks.join(", ")}`).poll(async () => {
    const statuses = await place.statuses(tasks);
    return statuses.every(({ done }) => done) ? statuses : undefined;
  }, LOOK_INTERVAL);
}
