import { findAccelerator } from "../test/kit/guest/accelerator.ts";
import { buildGuestImage, findGuestImage } from "../test/kit/guest/image.ts";
import { Failure, runQuietly } from "./command.ts";
import { installPackages, updatePackageLists } from "./packages.ts";

/** Parts beside Bun and its packages, which ./dev itself sees to. */
export type Part = "native" | "guest";

/** Brings the parts in place; silent and quick where they are. @throws Failure with what to do */
export async function prepare(...parts: readonly Part[]): Promise<void> {
  await installPackages();
  if (parts.includes("native")) await runQuietly(["make", "-C", "native", `-j${navigator.hardwareConcurrency}`]);
  if (parts.includes("guest")) await prepareGuest();
}

async function prepareGuest(): Promise<void> {
  let image = await findGuestImage();
  if (!image) {
    console.error("building the Linux guest of the demo and the tests (downloads about 75 MB)");
    await updatePackageLists();
    image = await buildGuestImage().catch((error: Error) => {
      throw new Failure(`the guest could not be built: ${error.message}`);
    });
  }
  await findAccelerator(image);
}
