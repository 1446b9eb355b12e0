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
import { NO_SERVICE, type ServiceEnvironment } from "../systemd/service-environment.ts";
import type { DaemonConfig } from "./config.ts";
import { addConfigured } from "./configured.ts";
import type { Deadlines } from "./deadlines.ts";
import { openKeeper } from "./ha/open-keeper.ts";
import { type Keeper, type KeeperInfo, nullKeeper } from "./keeper.ts";
import { createMethods } from "./methods.ts";
import { DeviceRegistry } from "./registry.ts";
import { vfTokenSource } from "./vf-token.ts";

/** Owner and group: whoever may control the daemon. */
const RPC_SOCKET_MODE = 0o660;

// The unit of the package leaves time for all of these (TimeoutStopSec).
/** For requests in progress, milliseconds. */
const STOP_REQUESTS = 2_000;
/** For VMMs of VMs that are being migrated to read what functions have written, milliseconds: a pass takes seconds. */
const STOP_MIGRATIONS = 20_000;
/** For a keeper that is away, milliseconds. */
const STOP_KEEPER = 2_000;
/** For operations that are under way, where another daemon goes on, milliseconds. */
const STOP_OPERATIONS = 2_000;
/** For all functions to give back what they have taken and to be let go of, milliseconds. */
const STOP_DEVICES = 45_000;

/** The parts of one daemon, put together. */
export class Daemon {
  private readonly running = new AsyncDisposableStack();
  /** The PFs and VFs of the configuration; settled when each was added or its failure logged. */
  private configured: Promise<void> = Promise.resolve();

  private keeper: Keeper = nullKeeper;
  /** Another daemon goes on with everything. */
  private leaving = false;
  private served: { readonly server: RpcServer; readonly registry: DeviceRegistry } | undefined;
  private end: (reason: string) => void = () => {};
  /** Somebody at the control interface wants it to end: resolves with the reason. */
  readonly ended = new Promise<string>((resolve) => {
    this.end = resolve;
  });

  /** @param deadlines others than the usual ones */
  constructor(
    private readonly config: DaemonConfig,
    private readonly log: Logger,
    private readonly deadlines: Partial<Deadlines> = {},
    /** What systemd has told this process. */
    private readonly environment: ServiceEnvironment = NO_SERVICE,
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
    // Nothing is taken up without a policy: it would be kept for nobody.
    const ha = plugins.adoption === undefined ? "off" : config.ha;
    const keeper = this.running.use(await openKeeper({ ...config, ha }, this.environment, log));
    this.keeper = keeper;
    const isOurs = (pid: number) => pid === process.pid;
    const registry = new DeviceRegistry({ bus, plugins, keeper, log, spaces, isOurs, deadlines: this.deadlines });
    this.running.defer(() => this.closeDevices(registry));
    await registry.collect();

    const server = new RpcServer(createMethods(registry, log.child("rpc"), this), {
      log: log.child("rpc"),
      peerCredentials,
    });
    this.running.defer(() => server.stop(STOP_REQUESTS));
    this.served = { server, registry };
    await server.listenUnix(socket, RPC_SOCKET_MODE);
    if (config.rpcTcp !== undefined) {
      const port = await server.listenTcp(config.rpcTcp);
      log.warn(`every local user can control this daemon through TCP ${config.rpcTcp.host}:${port}`);
    }
    const taken = registry.takeUp().catch((error) => log.error("not all VFs could be taken up", error));
    this.configured = taken.then(() => (this.leaving ? undefined : addConfigured(config, bus, registry, log)));
  }

  /** Who keeps what it has; undefined where nobody does now. */
  get keeperInfo(): KeeperInfo | undefined {
    return this.keeper.info?.();
  }

  /** Ends so that another daemon goes on with everything. @throws VhostdError notSupported where none could */
  upgrade(): void {
    this.checkProtected();
    this.end("an upgrade is asked for");
  }

  private checkProtected(): void {
    const info = this.keeperInfo;
    if (info?.protects === true) return;
    const why = info === undefined ? "nobody keeps what it has" : `${info.name} does not have all of what it has`;
    const start = "start vfe-vhostd-ha (systemctl start vfe-vhostd-ha), and try again a second later";
    const choose = `it was started with ha = "off": configure another way (ha = "auto"), and restart it once, which its VMs notice`;
    throw new VhostdError("notSupported", `the daemon cannot be replaced unnoticed: ${why}`, {
      fix: info === undefined && this.config.ha === "off" ? choose : start,
    });
  }

  /**
   * Serves no more requests; lets go of all functions, unless somebody keeps them for the next daemon.
   * Bounded in time; never rejects.
   * @returns "kept" where they are kept: this process is to end at once then, as if it was killed, with all that it has open
   */
  async stop(): Promise<"closed" | "kept"> {
    // Somebody may have restarted it just now.
    await this.keeper.reach?.(Deadline.after(STOP_KEEPER, "the keeper"));
    if (this.served !== undefined && (await this.handOver(this.served))) {
      this.log.info("its VFs run on, for the daemon that comes next");
      return "kept";
    }
    await this.running.disposeAsync();
    return "closed";
  }

  /** @returns false where nobody keeps what there is: all of it is to end */
  private async handOver({ server, registry }: NonNullable<Daemon["served"]>): Promise<boolean> {
    if (this.keeperInfo === undefined) return false;
    // What the configuration names is added by the daemon that comes next, also in the place of VFs that end here.
    this.leaving = true;
    await server.stop(STOP_REQUESTS);
    if (this.keeperInfo?.protects === false) {
      this.log.warn("not everything is kept: VFs that the keeper does not have end, so that the others run on");
      await registry.endUnkept(Deadline.after(STOP_DEVICES, "letting go of VFs that nobody keeps"));
    }
    if (!this.keeperInfo?.protects) return false;
    await registry.settle(Deadline.after(STOP_OPERATIONS, "the end of what is under way"));
    return true;
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
