#!/usr/bin/env bun
import { VERSION } from "../src/version.ts";

process.stderr.write(
  `vfe-vhostd-ha: version ${VERSION} has no keeper, so a restart of vfe-vhostd ends the sessions it serves; ` +
    "vfe-vhostd runs without one\n",
);
process.exitCode = 1;
