import { join } from "node:path";
import type { Logger } from "../base/log.ts";
import { peerCredentials, raiseOpenFileLimit } from "../native/sys.ts";
import { BUILT_IN_PLUGINS, PluginRegistry } from "../plugin-host.ts";
import { RpcServer } from "../rpc/server.ts";
import { makeRuntimeDirectory } from "../runtime-directory.ts";
import { BusDirectory } from "./bus-directory.ts";
import { controlSocket, resolvePf, type SoftvfConfig } from "./config.ts";
import { controlMethods } from "./control.ts";
import { PhysicalFunction } from "./physical-function.ts";

const SOCKET_MODE = 0o600;

/** All PFs of one process, their bus directory and the control socket. */
export class Softvf {
  private readonly pfs: PhysicalFunction[] = [];
  private readonly bus: BusDirectory;
  private readonly control: RpcServer;
  private published = false;
  private removeDirectory = async () => {};

  constructor(
    private readonly config: SoftvfConfig,
    private readonly log: Logger,
  ) {
    this.bus = new BusDirectory(join(config.runtimeDirectory, "devices"));
    this.control = new RpcServer(
      controlMethods(() => this.pfs.flatMap(({ functions }) => functions)),
      { log: log.child("control"), peerCredentials },
    );
  }

  /** Everything is served when it resolves; `stop` is to be called in any case. @throws VhostdError */
  async start(): Promise<void> {
    const { runtimeDirectory, plugins, pluginDirectory, pfs } = this.config;
    const sources = { builtIn: BUILT_IN_PLUGINS, plugins };
    const registry = await PluginRegistry.load(
      pluginDirectory === undefined ? sources : { ...sources, directory: pluginDirectory },
      this.log,
    );
    const asked = pfs.map((request) => resolvePf(request, registry));
    // Every queue has an eventfd, every function a socket.
    raiseOpenFileLimit();
    this.removeDirectory = await makeRuntimeDirectory(runtimeDirectory, "vfe-softvf");
    // First of all: two processes in one directory would take each other's sockets away.
    await this.control.listenUnix(controlSocket(runtimeDirectory), SOCKET_MODE);
    this.published = true;
    await this.bus.prepare();
    for (const options of asked) this.pfs.push(await PhysicalFunction.serve(options, this.bus, this.log));
  }

  /** Hangs up on all clients, takes sockets and directories away. */
  async stop(): Promise<void> {
    await this.control.stop();
    for (const pf of this.pfs.splice(0)) await pf.close();
    if (this.published) await this.bus.remove();
    await this.removeDirectory();
  }
}
