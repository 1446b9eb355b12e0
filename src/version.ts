import packageJson from "../package.json" with { type: "json" };

export const VERSION: string = packageJson.version;

/** Given to the build of an executable; a checkout is not built. */
export const BUILD_TIME: string = process.env["VFE_BUILD_TIME"] ?? "run from source";
