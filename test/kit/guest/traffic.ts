import type { Guest } from "./guest.ts";
import { FILE_SIZE } from "./lan-services.ts";
import type { LabNic, NetLab } from "./net-lab.ts";

/** Milliseconds between two changes of what `whileRunning` does in the guest. */
const PACE = 200;

export interface PingOptions {
  readonly count?: number;
  /** Bytes of payload. */
  readonly size?: number;
  /** Of the guest that sends; any unless said. */
  readonly processor?: number;
}

/** Pings the host's end of a network, one request after the other. @returns how many were not answered */
export async function lostPings(
  guest: Guest,
  { hostAddress, device }: LabNic,
  options: PingOptions = {},
): Promise<number> {
  const { count = 100, size = 56, processor } = options;
  const pinned = processor === undefined ? "" : `taskset ${(1 << processor).toString(16)} `;
  const { output } = await guest.attempt(`${pinned}ping -A -q -c ${count} -s ${size} -W 2 -I ${device} ${hostAddress}`);
  const [, sent, received] = /(\d+) packets transmitted, (\d+) packets received/.exec(output) ?? [];
  if (sent === undefined) throw new Error(`ping in the guest: ${output}`);
  return Number(sent) - Number(received);
}

/**
 * The guest fetches the file of the lab's web server through a card and keeps it as /tmp/file.
 * @param meanwhile a script of the guest, run over and over until the file is there; `$n` counts its runs from 0
 */
export async function fetchIntoGuest(guest: Guest, { hostAddress }: LabNic, meanwhile = ":"): Promise<void> {
  await guest.run(`rm -f /tmp/file
    wget -q -O /tmp/file http://${hostAddress}/file & fetch=$!
    n=0; while kill -0 $fetch 2> /dev/null; do
      ${meanwhile}
      n=$((n + 1)); usleep ${PACE * 1000}
    done
    wait $fetch && [ $(stat -c %s /tmp/file) = ${FILE_SIZE} ]`);
}

/** The host fetches what the guest has as /tmp/file through a card. @returns the checksum of what arrived */
export async function fetchFromGuest(lab: NetLab, guest: Guest, { guestAddress }: LabNic): Promise<string> {
  await guest.run("pidof httpd > /dev/null || httpd -p 80 -h /tmp");
  return await lab.services.fetchChecksum(`http://${guestAddress}/file`);
}

/** TCP traffic towards the guest without end, on each of the cards. Ends with the guest, or by `stopTraffic`. */
export async function startTraffic(guest: Guest, nics: readonly LabNic[]): Promise<void> {
  for (const { device, hostAddress } of nics) {
    await guest.run(`while true; do wget -q -O - http://${hostAddress}/file > /dev/null 2>&1 || usleep 50000; done &
      echo $! > /tmp/traffic.${device}`);
  }
}

export async function stopTraffic(guest: Guest): Promise<void> {
  await guest.run("kill $(cat /tmp/traffic.*); rm /tmp/traffic.*; killall wget 2> /dev/null; true");
}

/** Bytes that the guest has received at an interface. */
export async function receivedBytes(guest: Guest, { device }: LabNic): Promise<number> {
  return Number(await guest.run(`cat /sys/class/net/${device}/statistics/rx_bytes`));
}
