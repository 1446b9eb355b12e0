import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { eventfd, memfd, openFile } from "../../../src/native/sys.ts";
import {
  FLAG_REPLY,
  HEADER,
  MEMORY_REGION,
  PROTOCOL_VERSION,
  Request,
  SINGLE_REGION_PADDING,
  SINGLE_REGION_SIZE,
  VRING_ADDR,
  VRING_NO_FD,
  VRING_STATE,
} from "../../../src/vhost-user/messages.ts";
import { FeatureBit, featureBits } from "../../../src/virtio/features.ts";
import { config, memTable, singleRegion, u64, type VhostUserFrontend } from "./frontend.ts";

const ONE_MEGABYTE = 1 << 20;

/** Three regions with a hole, as a PC has; rings lie in the last. */
export const BAD_INPUT_MEMORY = [
  { gpa: 0, size: 0xa0000 },
  { gpa: 0xc0000, size: ONE_MEGABYTE },
  { gpa: 0x1_0000_0000, size: 8 * ONE_MEGABYTE },
];

/** Something that a front-end must not send, and what the back-end has to say about it. */
export interface BadInput {
  readonly what: string;
  /** How far the session has come: connected, negotiated, with memory, or running with two queues. */
  readonly from: "connected" | "negotiated" | "memory" | "running";
  send(frontend: VhostUserFrontend): Promise<unknown>;
  /** What the reason must name: the value seen and the limit. */
  readonly reason: readonly string[];
}

const NOTHING = new Uint8Array();
const vring = (index: number, num = 0) => VRING_STATE.encode({ index, num });

async function withFds(make: () => { number: number } & Disposable, count: number, use: (fds: number[]) => unknown) {
  using stack = new DisposableStack();
  await use(Array.from({ length: count }, () => stack.use(make()).number));
}

/** ADD_MEM_REG of a memfd of 1 MiB, described as told. */
function addRegion(
  fields: Partial<Parameters<typeof MEMORY_REGION.encode>[0]>,
  make = () => memfd("bad", ONE_MEGABYTE),
) {
  return (frontend: VhostUserFrontend) =>
    withFds(make, 1, (fds) => {
      const payload = new Uint8Array(SINGLE_REGION_SIZE);
      const region = {
        guestAddress: 0x2000_0000,
        size: ONE_MEGABYTE,
        userAddress: 0x1000_0000,
        fileOffset: 0,
        ...fields,
      };
      MEMORY_REGION.write(payload, region, SINGLE_REGION_PADDING);
      return frontend.send(Request.ADD_MEM_REG, payload, fds);
    });
}

function kickWith(
  make: () => { number: number } & Disposable,
  value = 0n,
  count = 1,
  request: number = Request.SET_VRING_KICK,
) {
  return (frontend: VhostUserFrontend) => withFds(make, count, (fds) => frontend.send(request, u64(value), fds));
}

/** SET_VRING_ADDR of ring 0 with 64 entries; addresses relative to the start of the last region. */
function ringAt(descriptor: number, available: number, used: number) {
  return async (frontend: VhostUserFrontend) => {
    const start = frontend.memory.regions.at(-1)!.userAddress;
    await frontend.send(Request.SET_VRING_NUM, vring(0, 64));
    const addresses = { descriptor: start + descriptor, available: start + available, used: start + used };
    await frontend.send(Request.SET_VRING_ADDR, VRING_ADDR.encode({ index: 0, ...addresses }));
  };
}

function header(request: number, size: number, flags = PROTOCOL_VERSION) {
  return (frontend: VhostUserFrontend) => frontend.channel.sendRaw(HEADER.encode({ request, flags, size }));
}

function diskFile() {
  // Not in os.tmpdir(), which may be a tmpfs.
  const directory = mkdtempSync(join(import.meta.dir, ".tmp-"));
  const path = join(directory, "memory");
  writeFileSync(path, new Uint8Array(ONE_MEGABYTE));
  const fd = openFile(path, "read-write");
  rmSync(directory, { recursive: true });
  return fd;
}

/** The last region holds the rings. */
const LAST = 8 * ONE_MEGABYTE;
const outOfRange = ["index 4 is out of range", "there are 4 queues"];

/**
 * For a back-end with 4 queues of at most 256 entries whose session has come as far as `from` says, with guest memory
 * of BAD_INPUT_MEMORY and rings of 64 entries.
 */
export const BAD_INPUT: readonly BadInput[] = [
  { what: "a request that is not known", from: "connected", send: (f) => f.send(99), reason: ["request 99"] },
  { what: "another protocol version", from: "connected", send: header(1, 0, 2), reason: ["version 2", "not 1"] },
  {
    what: "a reply",
    from: "connected",
    send: header(1, 0, PROTOCOL_VERSION | FLAG_REPLY),
    reason: ["GET_FEATURES (1)", "reply"],
  },
  {
    what: "a size of 4 GiB",
    from: "connected",
    send: header(2, 0xffff_ffff),
    reason: ["4294967295 bytes", "at most 8"],
  },
  {
    what: "a payload over the message's limit",
    from: "connected",
    send: (f) => f.send(2, new Uint8Array(9)),
    reason: ["9 bytes", "at most 8"],
  },
  {
    what: "a payload that is too short",
    from: "connected",
    send: (f) => f.send(2, new Uint8Array(4)),
    reason: ["SET_FEATURES (2)", "4 bytes", "must be 8"],
  },
  {
    what: "an fd where none belongs",
    from: "connected",
    send: (f) => withFds(eventfd, 1, (fds) => f.send(1, NOTHING, fds)),
    reason: ["1 fds", "must be 0"],
  },
  {
    what: "more fds than any message has",
    from: "connected",
    send: (f) => withFds(eventfd, 9, (fds) => f.send(1, NOTHING, fds)),
    reason: ["9 fds", "8"],
  },
  {
    what: "features that were not offered",
    from: "connected",
    send: (f) => f.send(2, u64(1n << 34n)),
    reason: ["0x400000000", "offered were 0x"],
  },
  {
    what: "protocol features that were not offered",
    from: "connected",
    send: (f) => f.send(16, u64(1n << 12n)),
    reason: ["0x1000", "offered were 0x"],
  },
  {
    what: "a message whose feature is missing",
    from: "connected",
    send: (f) => f.send(24, config(0, new Uint8Array(8))),
    reason: ["GET_CONFIG (24)", "CONFIG (9)", "negotiated are 0x0"],
  },
  {
    what: "a status wider than a byte",
    from: "negotiated",
    send: (f) => f.send(39, u64(0x100n)),
    reason: ["0x100", "0xff"],
  },
  ...[8, 10, 11, 18].map((request) => ({
    what: `queue index out of range in ${request}`,
    from: "negotiated" as const,
    send: (f: VhostUserFrontend) => f.send(request, vring(4, 1)),
    reason: outOfRange,
  })),
  {
    what: "queue index out of range in 9",
    from: "memory",
    send: (f) => f.send(9, VRING_ADDR.encode({ index: 4 })),
    reason: outOfRange,
  },
  ...[12, 13, 14].map((request) => ({
    what: `queue index out of range in ${request}`,
    from: "negotiated" as const,
    send: kickWith(eventfd, 4n, 1, request),
    reason: outOfRange,
  })),
  ...[0, 3, 512, 65536].map((size) => ({
    what: `a ring of ${size} entries`,
    from: "negotiated" as const,
    send: (f: VhostUserFrontend) => f.send(8, vring(0, size)),
    reason: [`${size} entries`, "power of two, 1 to 256"],
  })),
  {
    what: "a base beyond 16 bits",
    from: "negotiated",
    send: (f) => f.send(10, vring(1, 0x10000)),
    reason: ["65536", "65535"],
  },
  {
    what: "an enable that is no boolean",
    from: "negotiated",
    send: (f) => f.send(18, vring(1, 2)),
    reason: ["is 2", "0 or 1"],
  },
  {
    what: "a kick that is no eventfd",
    from: "negotiated",
    send: kickWith(() => memfd("x", 4096)),
    reason: ["kind regular", "eventfd"],
  },
  {
    what: "a call that is no eventfd",
    from: "negotiated",
    send: kickWith(() => memfd("x", 4096), 0n, 1, Request.SET_VRING_CALL),
    reason: ["call fd of ring 0", "kind regular"],
  },
  { what: "a kick without its fd", from: "negotiated", send: kickWith(eventfd, 1n, 0), reason: ["0 fds", "must be 1"] },
  {
    what: "a kick with an fd that it says is not there",
    from: "negotiated",
    send: kickWith(eventfd, VRING_NO_FD),
    reason: ["1 fds", "must be 0"],
  },
  {
    what: "two kicks",
    from: "negotiated",
    send: kickWith(eventfd, 0n, 2),
    reason: ["SET_VRING_KICK (12)", "2 fds", "0 to 1"],
  },
  {
    what: "a back-end channel that is no socket",
    from: "negotiated",
    send: (f) => withFds(eventfd, 1, (fds) => f.send(21, NOTHING, fds)),
    reason: ["back-end channel", "unix stream socket"],
  },
  {
    what: "memory on a disk's filesystem",
    from: "negotiated",
    send: addRegion({}, diskFile),
    reason: ["filesystem other", "tmpfs or hugetlbfs"],
  },
  {
    what: "memory that is no file",
    from: "negotiated",
    send: addRegion({}, eventfd),
    reason: ["kind eventfd", "regular file"],
  },
  {
    what: "memory of no size",
    from: "negotiated",
    send: addRegion({ size: 0 }),
    reason: ["size is 0", "at least 4096"],
  },
  {
    what: "memory beyond the end of its file",
    from: "negotiated",
    send: addRegion({ fileOffset: 4096 }),
    reason: ["offset 0x1000 + size 0x100000", "0x100000 bytes"],
  },
  {
    what: "memory whose size and offset overflow",
    from: "negotiated",
    send: addRegion({ fileOffset: 2 ** 52, size: 2 ** 53 - 4096 }),
    reason: ["0x10000000000000", "0x1ffffffffff000", "0x100000 bytes"],
  },
  {
    what: "memory at an address beyond 2^53",
    from: "negotiated",
    send: (f) =>
      withFds(
        () => memfd("x", 4096),
        1,
        (fds) => f.send(37, new Uint8Array(SINGLE_REGION_SIZE).fill(0xff), fds),
      ),
    reason: ["0xffffffffffffffff", "2^53"],
  },
  {
    what: "memory at an odd address",
    from: "negotiated",
    send: addRegion({ guestAddress: 0x800, size: 4096 }),
    reason: ["guestAddress 0x800", "4096"],
  },
  {
    what: "memory with an odd size",
    from: "negotiated",
    send: addRegion({ size: 100 }),
    reason: ["size 0x64", "4096"],
  },
  {
    what: "memory beyond what a guest can address",
    from: "negotiated",
    send: addRegion({ guestAddress: 2 ** 52 }),
    reason: ["0x10000000000000"],
  },
  {
    what: "overlapping guest addresses",
    from: "memory",
    send: addRegion({ guestAddress: 0x1_0000_0000 }),
    reason: ["0x100000000: size 0x100000 overlaps", "0x100000000+0x800000"],
  },
  {
    what: "overlapping user addresses",
    from: "memory",
    send: (f) => addRegion({ userAddress: f.memory.regions[1]!.userAddress })(f),
    reason: ["overlaps that of another", "+0x100000"],
  },
  {
    what: "a table with fewer fds than regions",
    from: "memory",
    send: (f) => f.send(5, memTable(f.memory.regions), []),
    reason: ["3 regions", "0 fds", "must be"],
  },
  {
    what: "a table of more regions than it has bytes",
    from: "memory",
    send: (f) => f.send(5, Uint8Array.of(8, 0, 0, 0, 0, 0, 0, 0)),
    reason: ["8 regions", "8 bytes", "264 bytes"],
  },
  {
    what: "a table that overlaps itself",
    from: "memory",
    send: (f) => f.setMemTable([f.memory.regions[0]!, f.memory.regions[0]!]),
    reason: ["overlaps", "0x0+0xa0000"],
  },
  {
    what: "removal of an unknown region",
    from: "negotiated",
    send: (f) => f.send(38, new Uint8Array(SINGLE_REGION_SIZE)),
    reason: ["no memory region of 0x0 bytes at 0x0", "there are 0"],
  },
  {
    what: "a descriptor table that leaves its region",
    from: "memory",
    send: ringAt(LAST - 1008, 0x1000, 0x2000),
    reason: ["descriptor table of ring 0", "1024 bytes", "+0x800000"],
  },
  {
    what: "an available ring that leaves its region",
    from: "memory",
    send: ringAt(0, LAST - 130, 0x2000),
    reason: ["available ring of ring 0", "134 bytes"],
  },
  {
    what: "a used ring that leaves its region",
    from: "memory",
    send: ringAt(0, 0x1000, LAST - 512),
    reason: ["used ring of ring 0", "518 bytes"],
  },
  {
    what: "a misaligned descriptor table",
    from: "memory",
    send: ringAt(8, 0x1000, 0x2000),
    reason: ["0x100000008", "multiple of 16"],
  },
  {
    what: "a misaligned available ring",
    from: "memory",
    send: ringAt(0, 0x1001, 0x2000),
    reason: ["0x100001001", "multiple of 2"],
  },
  {
    what: "a misaligned used ring",
    from: "memory",
    send: ringAt(0, 0x1000, 0x2002),
    reason: ["0x100002002", "multiple of 4"],
  },
  {
    what: "a ring without any memory",
    from: "negotiated",
    send: (f) => f.send(9, VRING_ADDR.encode({ index: 0 })),
    reason: ["user address 0x0", "there is none"],
  },
  {
    what: "a start without a size",
    from: "memory",
    send: async (f) => {
      await kickWith(eventfd)(f);
      await f.setFeatures();
      await f.setStatus(0xf);
    },
    reason: ["ring 0", "no size"],
  },
  {
    what: "a start without addresses",
    from: "memory",
    send: async (f) => {
      await kickWith(eventfd)(f);
      await f.send(8, vring(0, 64));
      await f.setFeatures();
      await f.setStatus(0xf);
    },
    reason: ["ring 0", "no addresses"],
  },
  {
    what: "a start before the features",
    from: "memory",
    send: async (f) => {
      await kickWith(eventfd)(f);
      await f.send(39, u64(0xfn));
    },
    reason: ["features 0x0", "VERSION_1"],
  },
  {
    what: "other features on a running device",
    from: "running",
    send: (f) => f.setFeatures(f.features & ~featureBits(FeatureBit.ringIndirectDesc)),
    reason: ["differ from those the device runs with", "0x"],
  },
  {
    what: "another size of a running ring",
    from: "running",
    send: (f) => f.send(8, vring(1, 128)),
    reason: ["size of ring 1 is 0x80", "0x40"],
  },
  {
    what: "another base of a running ring",
    from: "running",
    send: (f) => f.send(10, vring(1, 7)),
    reason: ["base of ring 1 is 0x7", "0x0"],
  },
  {
    what: "another address of a running ring",
    from: "running",
    send: ringAt(0x1000, 0x2000, 0x3000),
    reason: ["ring 0", "but the ring runs with 0x100000000"],
  },
  {
    what: "removal of the memory of a running ring",
    from: "running",
    send: (f) => f.send(38, singleRegion(f.memory.regions.at(-1)!)),
    reason: ["descriptor table of ring 0", "any more"],
  },
  {
    what: "a table without the memory of a running ring",
    from: "running",
    send: (f) => f.setMemTable(f.memory.regions.slice(0, 2)),
    reason: ["descriptor table of ring 0", "any more"],
  },
  {
    what: "SET_CONFIG that lies about its size",
    from: "negotiated",
    send: (f) => f.send(25, config(0, new Uint8Array(4)).fill(9, 4, 5)),
    reason: ["says 9 bytes", "carries 4"],
  },
  {
    what: "SET_CONFIG with unknown flags",
    from: "negotiated",
    send: (f) => f.send(25, config(12, new Uint8Array(1), 2)),
    reason: ["flags 2", "at most 1"],
  },
];

/** Brings a session as far as a bad input needs it. */
export async function prepareFor({ from }: BadInput, frontend: VhostUserFrontend): Promise<void> {
  if (from === "connected") return;
  await frontend.negotiate();
  if (from === "negotiated") return;
  await frontend.setupMemory(BAD_INPUT_MEMORY);
  if (from === "running") await frontend.startQueues(2, { size: 64 });
}
