import packageJson from "../package.json" with { type: "json" };

/** Put in place of its name when an executable is compiled (tools/package.ts); a checkout has none. */
declare const VFE_BUILD_TIME: string | undefined;

export const VERSION: string = packageJson.version;

export const BUILD_TIME: string = typeof VFE_BUILD_TIME === "undefined" ? "run from source" : VFE_BUILD_TIME;
