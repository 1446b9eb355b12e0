import { describe, expect, test } from "bun:test";
import { VhostdError } from "../../../src/base/errors.ts";
import { fileInfo, truncate } from "../../../src/native/sys.ts";
import { ProtocolFeature } from "../../../src/vhost-user/messages.ts";
import { featureBits } from "../../../src/virtio/features.ts";
import { FrontendMemory } from "../../kit/frontend/memory.ts";
import { connect, ONE_MEGABYTE, REGIONS, startRunning } from "./harness.ts";

describe("guest memory", () => {
  test("a new table is diffed: what stays is not unmapped, its new user address counts", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await startRunning(frontend, 1);
    const [first, second, last] = frontend.memory.regions;
    const added = frontend.memory.add(0x2_0000_0000, ONE_MEGABYTE);
    const moved = { file: last!.file, userAddress: 0x10_0000_0000 };
    await frontend.setMemTable([first!, added, moved]);
    expect(target.calls.slice(4)).toEqual(["unmap 0xc0000+0x100000", "map 0x200000000+0x100000"]);
    frontend.memory.regions.splice(frontend.memory.regions.indexOf(last!), 1, moved);
    expect(await frontend.setAddresses(frontend.queues[0]!)).toBe(0n);
    expect(pair.session.status.memory).toBe(0xa0000 + 9 * ONE_MEGABYTE);
    frontend.memory.drop(second!);
  });

  test("the same address from another file is unmapped before it is mapped", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await frontend.negotiate();
    await frontend.setupMemory(REGIONS.slice(0, 1));
    using other = new FrontendMemory(REGIONS.slice(0, 1));
    await frontend.setMemTable(other.regions);
    expect(target.calls).toEqual(["map 0x0+0xa0000", "unmap 0x0+0xa0000", "map 0x0+0xa0000"]);
    const { dev, ino } = fileInfo(other.regions[0]!.file.file.number);
    expect(target.mapped[0]?.file).toEqual({ dev, ino });
  });

  test("a region is removed with or without an fd, and may come again", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await startRunning(frontend, 1);
    const [first] = frontend.memory.regions;
    expect(await frontend.removeRegion(first!)).toBe(0n);
    expect(await frontend.addRegion(first!)).toBe(0n);
    expect(target.calls.slice(4)).toEqual(["unmap 0x0+0xa0000", "map 0x0+0xa0000"]);
  });

  test("a front-end may say everything about memory once for each pair of queues", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await startRunning(frontend, 1);
    const [first] = frontend.memory.regions;
    const before = target.calls.length;
    expect(await frontend.addRegion(first!)).toBe(0n);
    expect(target.calls.slice(before)).toEqual([]);
    for (const _ of ["first pair", "second pair"]) expect(await frontend.removeRegion(first!)).toBe(0n);
    for (const _ of ["first pair", "second pair"]) expect(await frontend.addRegion(first!)).toBe(0n);
    expect(target.calls.slice(before)).toEqual(["unmap 0x0+0xa0000", "map 0x0+0xa0000"]);
    expect(await frontend.removeRegion(first!)).toBe(0n);
    void frontend.removeRegion({ ...first!, userAddress: 0x1000 }).catch(() => {});
    expect((await pair.ended).reason).toContain("no memory region of 0xa0000 bytes at 0x0 (user address 0x1000)");
  });

  test("memory that cannot be mapped is refused where a reply was asked for, and ends the session where not", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await frontend.negotiate();
    target.before = (operation) => {
      if (operation === "map") throw new VhostdError("invalid", "the IOMMU ends at 2 GiB");
    };
    const region = frontend.memory.add(0, ONE_MEGABYTE);
    expect(await frontend.addRegion(region)).toBe(1n);
    expect(pair.lines.at(-1)).toContain("ADD_MEM_REG was refused: guest memory 0x0+0x100000 cannot be mapped");
    frontend.protocolFeatures &= ~featureBits(ProtocolFeature.REPLY_ACK);
    await frontend.addRegion(region);
    expect((await pair.ended).reason).toContain("the IOMMU ends at 2 GiB");
  });

  test("a front-end that shrinks its memory ends its own session only", async () => {
    await using pair = connect();
    const { frontend, target } = pair;
    await startRunning(frontend, 1);
    target.before = (operation) => {
      if (operation === "stop") truncate(frontend.memory.regions.at(-1)!.file.file.number, 0);
    };
    await frontend.getBase(0).catch(() => {});
    expect((await pair.ended).reason).toContain("the file of guest memory at 0x10000");
  });
});
