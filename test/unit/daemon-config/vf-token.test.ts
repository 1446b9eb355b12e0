import { afterEach, beforeEach, expect, test } from "bun:test";
import { chmodSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { vfTokenSource } from "../../../src/daemon/vf-token.ts";
import { rejection } from "../../kit/rejection.ts";

let directory: string;

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "vf-token-"));
});

afterEach(() => rmSync(directory, { recursive: true }));

const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;

test("a token is generated once, for its owner only, and found again", async () => {
  const state = join(directory, "a/state");
  const ask = vfTokenSource(undefined, state);
  const [token, same] = await Promise.all([ask(), ask()]);
  expect(token).toMatch(UUID);
  expect(same).toBe(token);
  expect(readdirSync(state)).toEqual(["vf-token"]);
  expect(statSync(join(state, "vf-token")).mode & 0o777).toBe(0o600);
  expect(await vfTokenSource(undefined, state)()).toBe(token);
});

test("two that begin at the same time agree", async () => {
  const tokens = await Promise.all([1, 2].map(() => vfTokenSource(undefined, directory)()));
  expect(tokens[0]).toBe(tokens[1]!);
  expect(readFileSync(join(directory, "vf-token"), "utf8").trim()).toBe(tokens[0]!);
});

test("a configured token is used as it is, and nothing is written", async () => {
  const token = "d3b07384-1b4d-4c2b-9f0e-0a1b2c3d4e5f";
  expect(await vfTokenSource(token, join(directory, "state"))()).toBe(token);
  expect(readdirSync(directory)).toEqual([]);
});

test("a damaged file is an error that names it, and works when it is repaired", async () => {
  const path = join(directory, "vf-token");
  const ask = vfTokenSource(undefined, directory);
  for (const text of ["", "d3b07384-1b4d", "\0".repeat(36)]) {
    writeFileSync(path, text);
    expect(await rejection(ask())).toMatchObject({ code: "invalid", message: expect.stringContaining(path) });
    expect(readFileSync(path, "utf8")).toBe(text);
  }
  writeFileSync(path, "d3b07384-1b4d-4c2b-9f0e-0a1b2c3d4e5f\n");
  expect(await ask()).toBe("d3b07384-1b4d-4c2b-9f0e-0a1b2c3d4e5f");
});

test("a directory that cannot be made is an error that names the file", async () => {
  writeFileSync(join(directory, "file"), "");
  chmodSync(join(directory, "file"), 0o600);
  const error = await rejection(vfTokenSource(undefined, join(directory, "file/state"))());
  expect(error).toMatchObject({ message: expect.stringContaining("file/state/vf-token") });
});
