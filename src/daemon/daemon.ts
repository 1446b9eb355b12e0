import { existsSync } from "node:fs";
import { Deadline } from "../base/deadline.ts";
import { SystemError, VhostdError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import { connectUnix, lockDirectory, peerCredentials, raiseOpenFileLimit } from "../native/sys.ts";
import { Bus } from "../pci/bus.ts";
import { addressSpaces } from "../pci/open.ts";
import { BUILT_IN_PLUGINS, PluginRegistry } from "../plugin-host.ts";
import { RpcServer } from "../rpc/server.ts";
import { makeRuntimeDirectory, rpcSocket } from "../runtime-directory.ts";
import type { DaemonConfig } from "./config.ts";
import { addConfigured } from "./configured.ts";
import type { Deadlines } from "./deadlines.ts";
import { nullKeeper } from "./keeper.ts";
import { createMethods } from "./methods.ts";
import { DeviceRegistry } from "./registry.ts";
import { vfTokenSource } from "./vf-token.ts";

/** Owner and group: whoever may control the daemon. */
const RPC_SOCKET_MODE = 0o660;

/** For requests in progress, milliseconds. */
const STOP_REQUESTS = 2_000;
/** For VMMs of VMs that are being migrated to read what functions have written, milliseconds: a pass takes seconds. */
const STOP_MIGRATIONS = 20_000;
/** For all functions to give back what they have taken and to be let go of, milliseconds. */
const STOP_DEVICES = 45_000;

/** The parts of one daemon, put together. */
export class Daemon {
  private readonly running = new AsyncDisposableStack();
  /** The PFs and VFs of the configuration; settled when each was added or its failure logged. */
  private configured: Promise<void> = Promise.resolve();

  /** @param deadlines others than the usual ones */
  constructor(
    private readonly config: DaemonConfig,
    private readonly log: Logger,
    private readonly deadlines: Partial<Deadlines> = {},
  ) {}

  /**
   * Returns when the control interface is served. What it opened is closed by stop(), also after a failure.
   * @throws VhostdError
   */
  async start(): Promise<void> {
    const { config, log } = this;
    this.running.defer(await makeRuntimeDirectory(config.runtimeDirectory, "vfe-vhostd"));
    for (const directory of config.busDirectories) {
      if (!existsSync(directory)) log.info(`there is no bus directory ${directory} yet`);
    }
    const socket = rpcSocket(config.runtimeDirectory);
    const lock = lockDirectory(config.runtimeDirectory);
    if (lock === undefined) throw secondDaemon(socket, config.runtimeDirectory);
    this.running.use(lock);
    log.debug(`up to ${raiseOpenFileLimit()} open files`);

    const sources = { builtIn: BUILT_IN_PLUGINS, plugins: config.plugins };
    const directory = config.pluginDirectory;
    const plugins = await PluginRegistry.load(directory === undefined ? sources : { ...sources, directory }, log);
    const bus = new Bus([...config.busDirectories]);
    const spaces = addressSpaces({
      interface: config.vfioInterface,
      token: vfTokenSource(config.vfToken, config.stateDirectory),
      log: log.child("vfio"),
    });
    const registry = new DeviceRegistry({ bus, plugins, keeper: nullKeeper, log, spaces, deadlines: this.deadlines });
    this.running.defer(() => this.closeDevices(registry));

    const server = new RpcServer(createMethods(registry, log.child("rpc")), {
      log: log.child("rpc"),
      peerCredentials,
    });
    this.running.defer(() => server.stop(STOP_REQUESTS));
    await server.listenUnix(socket, RPC_SOCKET_MODE);
    if (config.rpcTcp !== undefined) {
      const port = await server.listenTcp(config.rpcTcp);
      log.warn(`every local user can control this daemon through TCP ${config.rpcTcp.host}:${port}`);
    }
    this.configured = addConfigured(config, bus, registry, log);
  }

  /** Serves no more requests, lets go of all functions. Bounded in time; never rejects. */
  async stop(): Promise<void> {
    await this.running.disposeAsync();
  }

  private async closeDevices(registry: DeviceRegistry): Promise<void> {
    try {
      await registry.leaveMigrations(Deadline.after(STOP_MIGRATIONS, "leaving migrations"));
      const closed = this.configured.then(() => registry.close());
      await Deadline.after(STOP_DEVICES, "letting go of all functions").race(closed);
    } catch (error) {
      this.log.error("functions are left to the kernel", error);
    }
  }
}

/** Another daemon has this directory; its pid is known where it serves already. */
function secondDaemon(socket: string, directory: string): VhostdError {
  let who = "another daemon";
  try {
    using connection = connectUnix(socket);
    who = `the daemon with pid ${peerCredentials(connection.number).pid}`;
  } catch (error) {
    // It is just starting, or ending.
    if (!(error instanceof SystemError)) throw error;
  }
  return new VhostdError("busy", `${who} runs in ${directory} already`, {
    fix: "stop it first, or choose another directory with --runtime-dir",
  });
}
