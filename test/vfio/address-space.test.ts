import { afterAll, afterEach, beforeAll, describe, expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { readFile, rm, writeFile } from "node:fs/promises";
import { Deadline } from "../../src/base/deadline.ts";
import { fileInfo, openFile, truncate } from "../../src/native/sys.ts";
import type { VfioInterface } from "../../src/pci/vfio/address-space.ts";
import { atLength } from "../kit/at-length.ts";
import { lockedMemory } from "../kit/machine/bare-function.ts";
import { PROGRAM_ENVIRONMENT, programLine } from "../kit/machine/programs.ts";
import { rangeOf, refusal, SpaceLab, soon } from "../kit/machine/space-lab.ts";

/** Guest memory in address spaces of kernel VFIO, and what the tables of a real IOMMU say of it. */

const TIMEOUT = 120_000;
const MiB = 2 ** 20;
const GiB = 2 ** 30;
const HUGE_PAGE = 2 * MiB;
const MAPPING_LIMIT = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";
const INTERFACES: readonly VfioInterface[] = existsSync("/dev/iommu")
  ? atLength(["group", "iommufd"], ["iommufd"])
  : ["group"];

let lab: SpaceLab;

beforeAll(async () => {
  lab = await SpaceLab.create();
}, TIMEOUT);
afterEach(async () => {
  await lab.reset();
}, TIMEOUT);
afterAll(async () => {
  await lab?.[Symbol.asyncDispose]();
}, TIMEOUT);

describe.each(INTERFACES)("over %s", (kind) => {
  test(
    "guest memory is reachable as long as it is claimed, in pieces and as a whole",
    async () => {
      const domain = lab.domain(kind);
      await lab.attach(domain, "blk0");
      expect(await lab.reachable("blk0")).toEqual([]);
      const low = await lab.claim(domain, 0, 4 * MiB);
      const across = await lab.claim(domain, GiB - 2 * MiB, 4 * MiB);
      expect(await lab.reachable("blk0")).toEqual([
        { start: 0, end: 4 * MiB },
        { start: GiB - 2 * MiB, end: GiB + 2 * MiB },
      ]);
      expect(lockedMemory(process.pid)).toBe(8 * MiB);
      await low();
      expect(await lab.reachable("blk0")).toEqual([{ start: GiB - 2 * MiB, end: GiB + 2 * MiB }]);
      await across();
      expect(await lab.reachable("blk0")).toEqual([]);
    },
    TIMEOUT,
  );

  test(
    "memory of huge pages, cut also inside of them",
    async () => {
      const pages = "/proc/sys/vm/nr_hugepages";
      const file = "/dev/hugepages/address-space-test";
      await writeFile(pages, "8");
      try {
        await writeFile(file, "");
        const huge = openFile(file, "read-write");
        lab.keep(huge);
        truncate(huge.number, 4 * HUGE_PAGE);
        expect(fileInfo(huge.number).filesystem).toBe("hugetlbfs");
        const domain = lab.domain(kind);
        await lab.attach(domain, "blk0");
        const parts = [rangeOf(huge, 0, HUGE_PAGE - 4096, 4096), rangeOf(huge, 4 * MiB, 2 * HUGE_PAGE, HUGE_PAGE)];
        for (const part of parts) await domain.claim("test", part, huge.number);
        expect(await lab.reachable("blk0")).toEqual([
          { start: 0, end: HUGE_PAGE - 4096 },
          { start: 4 * MiB, end: 8 * MiB },
        ]);
        await domain.releaseAll("test");
        expect(await lab.reachable("blk0")).toEqual([]);
      } finally {
        await rm(file, { force: true });
        await writeFile(pages, "0");
      }
    },
    TIMEOUT,
  );

  test(
    "two functions of one VM share its memory, also what was mapped before the second came; one goes, the other stays",
    async () => {
      const domain = lab.domain(kind);
      const first = await lab.attach(domain, "blk0");
      await lab.claim(domain, 0, 2 * MiB);
      const second = await lab.attach(domain, "blk1");
      const late = await lab.claim(domain, 8 * MiB, 2 * MiB);
      const both = [
        { start: 0, end: 2 * MiB },
        { start: 8 * MiB, end: 10 * MiB },
      ];
      expect(await lab.reachable("blk0")).toEqual(both);
      expect(await lab.reachable("blk1")).toEqual(both);
      await lab.close(domain, first);
      expect(await lab.reachable("blk1")).toEqual(both);
      await late();
      expect(await lab.reachable("blk1")).toEqual(both.slice(0, 1));
      await lab.close(domain, second);
    },
    TIMEOUT,
  );

  test(
    "two VMs never share: what one has mapped is not there for the other",
    async () => {
      const [one, other] = [lab.domain(kind, "VM 1"), lab.domain(kind, "VM 2")];
      await lab.attach(one, "blk0");
      await lab.attach(other, "blk1");
      await lab.claim(one, 0, 2 * MiB);
      expect(await lab.reachable("blk1")).toEqual([]);
      await lab.claim(other, 16 * MiB, 4 * MiB);
      expect(await lab.reachable("blk0")).toEqual([{ start: 0, end: 2 * MiB }]);
      expect(await lab.reachable("blk1")).toEqual([{ start: 16 * MiB, end: 20 * MiB }]);
    },
    TIMEOUT,
  );

  test(
    "memory in the window of interrupts, or beyond the IOMMU's addresses, is refused by name",
    async () => {
      const domain = lab.domain(kind);
      await lab.attach(domain, "blk0");
      const window = await refusal(lab.claim(domain, 0xfee0_0000, MiB));
      expect(window).toMatchObject({ code: "iommuDomain", data: { start: 0xfee0_0000, end: 0xfeef_ffff } });
      expect(window.message).toContain("[0xfee00000, 0xfeefffff]");
      const across = await refusal(lab.claim(domain, 0xfed0_0000, 3 * MiB));
      expect(across.message).toContain("meets [0xfee00000, 0xfeefffff]");
      const end = 2 ** lab.machine.description.addressBits;
      const beyond = await refusal(lab.claim(domain, end - MiB, 2 * MiB));
      expect(beyond.message).toContain(`meets [0x${end.toString(16)},`);
      await lab.claim(domain, end - MiB, MiB);
      expect(await lab.reachable("blk0")).toEqual([{ start: end - MiB, end }]);
    },
    TIMEOUT,
  );

  test(
    "memory stays mapped where the last function is closed before it is unmapped, and the next one has it",
    async () => {
      const domain = lab.domain(kind);
      const first = await lab.attach(domain, "blk0");
      const release = await lab.claim(domain, 0, 2 * MiB);
      await lab.close(domain, first);
      const second = await lab.attach(domain, "blk1");
      expect(await lab.reachable("blk1")).toEqual([{ start: 0, end: 2 * MiB }]);
      await lab.close(domain, second);
      await release();
      // Nothing of it is left with the function: another VM can have it.
      await lab.attach(lab.domain(kind, "VM 2"), "blk0");
      await lab.attach(domain, "blk1");
      expect(await lab.reachable("blk1")).toEqual([]);
    },
    TIMEOUT,
  );

  test(
    "a mapping whose time is over is taken back, and the memory can be mapped then",
    async () => {
      const { space, domain } = lab.space(kind);
      await lab.attach(domain, "blk0");
      const size = 64 * MiB;
      const file = lab.file(size);
      const range = rangeOf(file, 0, size);
      expect(await refusal(space.map(range, file.number, Deadline.after(1, "mapping")))).toMatchObject({
        code: "timedOut",
      });
      await space.map(range, file.number, soon("mapping"));
      expect(await lab.reachable("blk0")).toEqual([{ start: 0, end: size }]);
      await space.unmap(range, soon("unmapping"));
      expect(await lab.reachable("blk0")).toEqual([]);
    },
    TIMEOUT,
  );

  test(
    "the limit of locked memory is named where it is the cause, and nothing is mapped",
    async () => {
      const program = [...programLine("locked-program"), kind, lab.address("blk0")];
      const limited = [
        "setpriv",
        "--inh-caps=-ipc_lock",
        "--bounding-set=-ipc_lock",
        "prlimit",
        `--memlock=${8 * MiB}`,
      ];
      const child = Bun.spawn([...limited, ...program, "4", "64"], {
        env: { ...process.env, ...PROGRAM_ENVIRONMENT },
        stdout: "pipe",
        stderr: "inherit",
      });
      const text = await child.stdout.text();
      expect(await child.exited).toBe(0);
      const [small, big] = JSON.parse(text) as unknown[];
      expect(small).toBe("mapped");
      expect(big).toMatchObject({
        code: "outOfMemory",
        message: expect.stringMatching(/RLIMIT_MEMLOCK\) is 8 MiB.* 64 MiB/),
        fix: expect.stringContaining("LimitMEMLOCK=infinity"),
      });
    },
    TIMEOUT,
  );
});

test(
  "the kernel's limit of mappings is named where it is the cause, and nothing of the range is mapped",
  async () => {
    const usual = await readFile(MAPPING_LIMIT, "utf8");
    await writeFile(MAPPING_LIMIT, "2");
    try {
      const domain = lab.domain("group");
      await lab.attach(domain, "blk0");
      await lab.claim(domain, 0, 2 * MiB);
      const error = await refusal(lab.claim(domain, GiB - 2 * MiB, 4 * MiB));
      expect(error.code).toBe("limitExceeded");
      expect(error.message).toContain("limit of 2 mappings");
      expect(error.fix).toContain("dma_entry_limit");
      expect(await lab.reachable("blk0")).toEqual([{ start: 0, end: 2 * MiB }]);
    } finally {
      await writeFile(MAPPING_LIMIT, usual);
    }
  },
  TIMEOUT,
);
