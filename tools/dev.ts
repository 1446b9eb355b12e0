/** The developer's commands. ./dev starts this with the project's Bun and its packages in place. */
import { runTask } from "./command.ts";

await runTask(
  {
    setup: () => import("./setup.ts").then((module) => module.default),
    demo: () => import("./demo.ts").then((module) => module.default),
    test: () => import("./test.ts").then((module) => module.default),
    bench: () => import("./bench.ts").then((module) => module.default),
    machine: () => import("./machine.ts").then((module) => module.default),
    fuzz: () => import("./fuzz.ts").then((module) => module.default),
    fmt: () => import("./fmt.ts").then((module) => module.default),
    lint: () => import("./lint.ts").then((module) => module.default),
    package: () => import("./package.ts").then((module) => module.default),
  },
  process.argv.slice(2),
);
