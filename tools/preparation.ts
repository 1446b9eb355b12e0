import { findDebian, makeDebian } from "../test/kit/clean-debian/image.ts";
import { findAccelerator } from "../test/kit/guest/accelerator.ts";
import { buildGuestImage, findGuestImage, type GuestImage } from "../test/kit/guest/image.ts";
import { Failure, runQuietly } from "./command.ts";
import { installPackages, updatePackageLists } from "./packages.ts";

/** Parts beside Bun and its packages, which ./dev itself sees to. */
export type Part = "native" | "guest" | "debian";

/** Brings the parts in place; silent and quick where they are. @throws Failure with what to do */
export async function prepare(...parts: readonly Part[]): Promise<void> {
  await installPackages();
  if (parts.includes("native")) await runQuietly(["make", "-C", "native", `-j${navigator.hardwareConcurrency}`]);
  if (parts.includes("guest")) await prepareGuest();
  if (parts.includes("debian")) await prepareDebian();
}

/** The Linux guest of the demo and the tests, and how it is run. @throws Failure when it cannot be had */
export async function prepareGuest(): Promise<void> {
  await findAccelerator((await findGuestImage()) ?? (await makeGuest()));
}

async function makeGuest(): Promise<GuestImage> {
  console.error("building the Linux guest of the demo and the tests (downloads about 75 MB)");
  try {
    await updatePackageLists();
    return await buildGuestImage();
  } catch (error) {
    throw new Failure(`the guest could not be built: ${error instanceof Error ? error.message : error}`);
  }
}

/** The Debian in which the package is tried. Without one there is less to test. */
async function prepareDebian(): Promise<void> {
  if (process.getuid?.() !== 0) return;
  try {
    if ((await findDebian()) !== undefined) return;
    console.error("making a clean Debian for the tests (downloads about 45 MB)");
    await makeDebian();
  } catch (error) {
    console.error(`no clean Debian, its tests will be skipped: ${error instanceof Error ? error.message : error}`);
  }
}
