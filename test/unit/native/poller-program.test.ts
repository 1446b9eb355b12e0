import { expect, test } from "bun:test";

/** The exit code of a program of its own, and what it printed. */
async function runProgram(body: string): Promise<{ code: number; output: string }> {
  const root = new URL("../../../src/native/", import.meta.url).pathname;
  const imports = `import { watch } from "${root}poller.ts"; import { eventfd, signalEventfd } from "${root}sys.ts";`;
  const child = Bun.spawn([process.execPath, "-e", `${imports}\n${body}`], { stdout: "pipe", stderr: "inherit" });
  const killer = setTimeout(() => child.kill(), 5000);
  const output = await new Response(child.stdout).text();
  const code = await child.exited;
  clearTimeout(killer);
  return { code, output };
}

test("a watch keeps the program alive; one that was unref'ed or disposed of does not", async () => {
  const waiting = `const fd = eventfd(); const ready = watch(fd.number, "in", () => { console.log("fired"); ready[Symbol.dispose](); });`;
  const held = await runProgram(`${waiting} setTimeout(() => signalEventfd(fd.number), 20).unref();`);
  // The timer holds nothing, so only the watch can have kept the program until the signal.
  expect(held).toEqual({ code: 0, output: "fired\n" });
  expect(await runProgram(`${waiting} ready.unref();`)).toEqual({ code: 0, output: "" });
});

test("an error of a handler is uncaught, and other handlers run all the same", async () => {
  const { code, output } = await runProgram(`
    process.on("uncaughtException", (error) => console.log(error.message));
    const fds = [eventfd(), eventfd()];
    const watches = fds.map((fd, index) => watch(fd.number, "in", () => {
      watches[index][Symbol.dispose]();
      throw new Error("handler failed");
    }));
    for (const fd of fds) signalEventfd(fd.number);`);
  expect({ code, output }).toEqual({ code: 0, output: "handler failed\nhandler failed\n" });
});
