import { join } from "node:path";
import { testDeviceClass } from "vfe-vhostd/test-kit";

testDeviceClass({
  plugin: join(import.meta.dir, "index.ts"),
  softvf: [],
  async exercise({ queues }) {
    for (const { driver } of queues) {
      const { length, written } = await driver.request([], [64, 64]);
      const bytes = Buffer.concat(written);
      if (length !== 128 || new Set(bytes).size < 32) throw new Error(`${length} bytes, not random: ${bytes.toHex()}`);
    }
  },
});
