import { createServer, type Server, type Socket } from "node:net";

/**
 * Our end of a character device of QEMU that speaks in lines. We listen and QEMU connects when it starts, so nothing the
 * guest says can be lost before we are there.
 */
export class LineServer implements Disposable {
  private socket: Socket | undefined;
  private unsent = "";
  private partial = "";

  private constructor(
    private readonly server: Server,
    private readonly onLine: (line: string) => void,
  ) {
    server.on("connection", (socket) => this.accept(socket));
  }

  static async listen(path: string, onLine: (line: string) => void): Promise<LineServer> {
    const server = createServer();
    const lines = new LineServer(server, onLine);
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    server.once("error", reject);
    server.listen(path, resolve);
    await promise;
    return lines;
  }

  send(line: string): void {
    if (this.socket) this.socket.write(`${line}\n`);
    else this.unsent += `${line}\n`;
  }

  [Symbol.dispose](): void {
    this.socket?.destroy();
    this.server.close();
  }

  private accept(socket: Socket): void {
    this.socket = socket;
    socket.setEncoding("latin1");
    socket.on("data", (text: string) => this.receive(text));
    // QEMU that was killed resets the connection; its exit is reported by the process.
    socket.on("error", () => socket.destroy());
    socket.write(this.unsent);
  }

  private receive(text: string): void {
    const lines = (this.partial + text).split("\n");
    this.partial = lines.pop() ?? "";
    for (const line of lines) this.onLine(line.trimEnd());
  }
}
