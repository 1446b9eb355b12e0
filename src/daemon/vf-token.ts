import { randomUUID } from "node:crypto";
import { link, mkdir, open, readFile, unlink } from "node:fs/promises";
import { join } from "node:path";
import { errnoText, VhostdError } from "../base/errors.ts";
import { parseVfToken } from "./uuid.ts";

/** Where a generated token is kept, in the state directory. */
const FILE_NAME = "vf-token";
const FILE_MODE = 0o600;

/**
 * Where the vf-token comes from: the secret that PFs and their VFs are opened with (VFIO's vf_token). The kernel refuses
 * another one as long as anybody holds a VF of the PF open, so a token that was generated is kept and used again.
 * @param configured used where it is given; nothing is read or written then
 * @param directory of the state; made when it is needed first
 * @returns asks for the token: a UUID; throws VhostdError with the file that is damaged, or that cannot be read or made
 */
export function vfTokenSource(configured: string | undefined, directory: string): () => Promise<string> {
  if (configured !== undefined) return async () => configured;
  let asked: Promise<string> | undefined;
  return () => {
    asked ??= storedToken(directory).catch((error) => {
      // Whoever repairs the file need not restart the daemon.
      asked = undefined;
      throw error;
    });
    return asked;
  };
}

async function storedToken(directory: string): Promise<string> {
  const path = join(directory, FILE_NAME);
  try {
    return (await readToken(path)) ?? (await makeToken(directory, path));
  } catch (cause) {
    if (cause instanceof VhostdError) throw cause;
    const errno = Math.abs((cause as NodeJS.ErrnoException).errno ?? 5);
    throw new VhostdError(errno, `the vf-token cannot be kept in ${path}: ${errnoText(errno)}`, {
      fix: "choose a directory that can be written with --state-dir, or give vf-token in the configuration",
      cause,
    });
  }
}

/** @returns undefined where there is no file */
async function readToken(path: string): Promise<string | undefined> {
  const text = await readFile(path, "utf8").catch((error: NodeJS.ErrnoException) => {
    if (error.code === "ENOENT") return undefined;
    throw error;
  });
  if (text === undefined) return undefined;
  try {
    return parseVfToken(text.trim());
  } catch (cause) {
    throw new VhostdError("invalid", `${path} is damaged: it holds no UUID`, {
      fix: "write the token into it that the PFs in use were opened with; or, where none is in use, delete it",
      cause,
    });
  }
}

/** Whole or not at all, and never in the place of another daemon's. */
async function makeToken(directory: string, path: string): Promise<string> {
  await mkdir(directory, { recursive: true, mode: 0o700 });
  const token = randomUUID();
  const temporary = `${path}.${randomUUID()}`;
  try {
    await using file = await open(temporary, "wx", FILE_MODE);
    await file.writeFile(`${token}\n`);
    await file.sync();
    await link(temporary, path);
    return token;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
    return (await readToken(path)) ?? token;
  } finally {
    await unlink(temporary).catch(() => {});
  }
}
