#!/usr/bin/env bun
import { runProgram } from "../src/command-line.ts";
import { runSoftvf } from "../src/softvf/main.ts";

await runProgram(() => runSoftvf(process.argv.slice(2)));
