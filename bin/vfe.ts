#!/usr/bin/env bun
import { basename } from "node:path";

/** Several programs in one executable that has a name for each: it is the one by whose name it is called. */
const PROGRAMS: Readonly<Record<string, () => Promise<unknown>>> = {
  "vfe-vhostd": () => import("./vhostd.ts"),
  "vfe-softvf": () => import("./vfe-softvf.ts"),
  "vfe-vhost-cli": () => import("./vfe-vhost-cli.ts"),
};

const name = basename(process.argv0);
const program = PROGRAMS[name];
if (program === undefined) {
  process.stderr.write(`no program is called ${name}: call this file by one of ${Object.keys(PROGRAMS).join(", ")}\n`);
  process.exitCode = 2;
} else await program();
