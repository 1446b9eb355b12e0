import { expect, test } from "bun:test";
import type { Guest } from "../kit/guest/guest.ts";
import { configure, type LabNic, NetLab, queueCounts } from "../kit/guest/net-lab.ts";
import { fetchFromGuest, fetchIntoGuest, lostPings } from "../kit/guest/traffic.ts";

const MTU = 9000;
/** Bytes of the headers of IP and ICMP. */
const PING_HEADERS = 28;

/** IP packets that the guest has sent in pieces. */
async function fragmented(guest: Guest): Promise<number> {
  return Number(await guest.run("awk '/^Ip: [0-9]/ { print $18 }' /proc/net/snmp"));
}

/** A card that is given its address by the DHCP server behind it. */
async function lease(lab: NetLab, guest: Guest, { device, tap, guestAddress }: LabNic): Promise<void> {
  const server = await lab.services.serveDhcp({ device: tap, first: guestAddress, last: guestAddress });
  await guest.run(`ip link set ${device} mtu ${MTU} up`);
  const said = await guest.run(`udhcpc -i ${device} -n -q -t 5 -T 1 -s /etc/udhcpc`);
  expect(said).toContain(`lease ${guestAddress}/24 on ${device}`);
  expect(server.log).toContain(`sending ACK to ${guestAddress}`);
}

/** Fetches the file, and gives it back, while the guest changes how many pairs it uses. */
async function exchange(lab: NetLab, guest: Guest, nic: LabNic): Promise<void> {
  const { pairs } = nic;
  const counts = Array.from({ length: pairs }, (_, index) => ((index * 3) % pairs) + 1);
  const change = `set -- ${counts.join(" ")}; shift $((n % $#)); ethtool -L ${nic.device} combined $1`;
  await fetchIntoGuest(guest, nic, pairs === 1 ? ":" : change);
  const back = fetchFromGuest(lab, guest, nic);
  let done = false;
  const changes = async () => {
    for (let turn = 1; !done && pairs > 1; turn++) {
      await guest.run(`ethtool -L ${nic.device} combined ${counts[turn % pairs]}`);
      await Bun.sleep(100);
    }
  };
  const changing = changes();
  try {
    expect(await back).toBe(lab.services.checksum);
  } finally {
    done = true;
    await changing;
  }
}

for (const pairs of [1, 4]) {
  test(`a Linux guest's traffic through ${pairs} pairs of queues: DHCP, ping, TCP both ways, MTU 9000, ethtool -L`, async () => {
    // Either QEMU tells the guest of its MTU, or the guest sets it.
    const announceMtu = pairs === 1;
    await using lab = await NetLab.create({ pairs, mtu: MTU, announceMtu });
    const guest = await lab.bootGuest({ processors: pairs, memory: 640 });
    for (const { device } of lab.nics) {
      expect(await guest.run(`cat /sys/class/net/${device}/mtu`)).toBe(announceMtu ? `${MTU}` : "1500");
    }
    const [fixed, leased] = [lab.nic("vendor"), lab.nic("none")];
    await configure(guest, [fixed], MTU);
    await lease(lab, guest, leased);
    for (const nic of lab.nics) {
      expect(await guest.run(`cat /sys/class/net/${nic.device}/address`)).toBe(nic.mac);
      expect(await guest.run(`ethtool -l ${nic.device} | awk '/Combined/ { print $2 }'`)).toBe(`${pairs}\n${pairs}`);
      // Every processor has a queue of its own to send with.
      for (let processor = 0; processor < pairs; processor++) {
        expect(await lostPings(guest, nic, { count: 50, processor })).toBe(0);
      }
      for (const { queue, received } of await queueCounts(nic)) {
        if (queue % 2 === 1) expect(received).toBeGreaterThanOrEqual(50);
      }
      const before = await fragmented(guest);
      expect(await lostPings(guest, nic, { size: MTU - PING_HEADERS })).toBe(0);
      expect(await fragmented(guest)).toBe(before);

      await exchange(lab, guest, nic);
      expect(await lostPings(guest, nic)).toBe(0);
      expect((await queueCounts(nic)).map(({ bad }) => bad)).toEqual(Array.from({ length: 2 * pairs }, () => 0));
    }
  }, 120_000);
}
