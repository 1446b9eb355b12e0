#!/usr/bin/env bun
import { runCli } from "../src/cli/main.ts";
import { runProgram } from "../src/command-line.ts";

await runProgram(() => runCli(process.argv.slice(2)));
