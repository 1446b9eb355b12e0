#!/usr/bin/env bun
import { runProgram } from "../src/command-line.ts";
import { runDaemon } from "../src/daemon/main.ts";

await runProgram(() => runDaemon(process.argv.slice(2)));
