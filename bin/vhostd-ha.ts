#!/usr/bin/env bun
import { runProgram } from "../src/command-line.ts";
import { runKeeper } from "../src/keeper/main.ts";

await runProgram(() => runKeeper(process.argv.slice(2)));
