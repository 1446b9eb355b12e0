import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { FrontendListener } from "../kit/frontend/frontend.ts";
import { Machine } from "../kit/machine/inside.ts";
import { MACHINE_TEST_TIMEOUT, MachineLab } from "../kit/machine/lab.ts";
import { NetFrontend } from "../kit/net/net-frontend.ts";
import { NetGuest } from "../kit/net/net-guest.ts";
import { COMPLETE } from "../kit/net/streams.ts";

/**
 * The commands of the existing stack's guide, as they are written there, for an SR-IOV function and its VFs: vfio-pci has
 * both, and the kernel opens a VF only with the token that its PF was opened with.
 */

const { sriov } = Machine.here().description;
const SRIOV = sriov ? "" : " [skip: this QEMU emulates no SR-IOV]";
const SUCCESS = { errno: 0, errstr: "Success" };
/** Of each VF its own. */
const VMS = ["ee8b6429-eb1e-45e7-9dab-aff843b99075", "ee8b6429-eb1e-45e7-9dab-aff843b99076"] as const;
const PF_HAS_VFS = -1013;

describe.skipIf(!sriov)(`a PF with two VFs${SRIOV}`, () => {
  let lab: MachineLab;
  let pf: string;
  let vfs: readonly string[];
  const undo = new AsyncDisposableStack();
  const guests: NetGuest[] = [];

  beforeAll(async () => {
    lab = undo.use(await MachineLab.create());
    vfs = await lab.makeVfs("pf0", 2);
    pf = lab.machine.function("pf0").address;
  }, MACHINE_TEST_TIMEOUT);
  afterAll(async () => {
    await undo.disposeAsync();
  }, MACHINE_TEST_TIMEOUT);

  /** Runs vfe-vhost-cli. @returns what it prints */
  async function cli(...words: readonly string[]) {
    const { code, stdout, stderr } = await lab.cli(...words);
    return { code, stderr, ...JSON.parse(stdout) };
  }

  const socket = (index: number) => `${lab.directory}/vhost-net${index}`;
  /** "0000:af:04.5" → "af:04.5". */
  const short = (address: string) => address.replace(/^0000:/, "");

  test(
    "vf -a before mgmtpf -a: the PF is missed",
    async () => {
      const refused = await cli("vf", "-a", vfs[0]!, "-v", socket(0));
      expect(refused).toMatchObject({ code: 1, errno: -1001 });
      expect(refused.stderr).toContain("it may be removed again afterwards");
    },
    MACHINE_TEST_TIMEOUT,
  );

  test(
    "mgmtpf -a, mgmtpf -l",
    async () => {
      expect(await cli("mgmtpf", "-a", pf)).toMatchObject({ code: 0, ...SUCCESS });
      expect(await cli("mgmtpf", "-l")).toMatchObject({ code: 0, devices: [{ pf }], ...SUCCESS });
    },
    MACHINE_TEST_TIMEOUT,
  );

  test(
    "vf -a … -v … -u …: the daemon comes to the VMM's socket; vf -l, vf -i",
    async () => {
      for (const [index, vf] of vfs.entries()) {
        using listener = new FrontendListener(socket(index));
        const added = await cli("vf", "-a", index === 0 ? vf : short(vf), "-v", socket(index), "-u", VMS[index]!);
        expect(added).toMatchObject({ code: 0, ...SUCCESS });
        guests.push(undo.use(await NetGuest.boot(new NetFrontend(await listener.acceptFd()), { size: 64 })));
        await lab.reaches(vf, "running");
      }
      const listed = await cli("vf", "-l", pf);
      expect(listed.devices).toHaveLength(2);
      const { device, errno } = await cli("vf", "-i", vfs[1]!);
      expect(errno).toBe(0);
      expect(device).toMatchObject({ vf: vfs[1], vm_uuid: VMS[1], socket_file: socket(1), configured: true });
    },
    MACHINE_TEST_TIMEOUT,
  );

  test(
    "frames go from VF to VF, both ways",
    async () => {
      const [a, b] = guests as [NetGuest, NetGuest];
      const streams = [a.stream(0, b), b.stream(0, a)];
      for (const stream of streams) await stream.progress(500);
      for (const stream of streams) expect(await stream.stop()).toEqual(COMPLETE);
      expect(lab.takeFaults()).toEqual([]);
    },
    MACHINE_TEST_TIMEOUT,
  );

  test(
    "mgmtpf -r is refused while there are VFs",
    async () => {
      const refused = await cli("mgmtpf", "-r", pf);
      expect(refused).toMatchObject({ code: 1, errno: PF_HAS_VFS });
      expect(refused.stderr).toContain('"vf -r"');
    },
    MACHINE_TEST_TIMEOUT,
  );

  test(
    "vf -d tells that such a VF is not managed",
    async () => {
      expect(await cli("vf", "-d", "-o", "6", vfs[0]!)).toMatchObject({ code: 1, errno: -95 });
    },
    MACHINE_TEST_TIMEOUT,
  );

  test(
    "vf -r, mgmtpf -r, and all of it once more",
    async () => {
      for (const [index, vf] of vfs.entries()) {
        expect(await cli("vf", "-r", vf)).toMatchObject({ code: 0, ...SUCCESS });
        await guests[index]!.frontend.hungUp();
      }
      expect(await cli("mgmtpf", "-r", pf)).toMatchObject({ code: 0, ...SUCCESS });
      expect(await cli("mgmtpf", "-l")).toMatchObject({ devices: [] });
      expect(await cli("mgmtpf", "-a", short(pf))).toMatchObject(SUCCESS);
      expect(await cli("vf", "-a", vfs[0]!, "-v", socket(0), "--server")).toMatchObject(SUCCESS);
      expect(await cli("vf", "-r", short(vfs[0]!))).toMatchObject(SUCCESS);
      expect(await cli("mgmtpf", "-r", pf)).toMatchObject(SUCCESS);
      expect(lab.takeFaults()).toEqual([]);
    },
    MACHINE_TEST_TIMEOUT,
  );
});
