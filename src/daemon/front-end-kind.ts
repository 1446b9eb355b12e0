/** `nvidia-presetup`: the branch stable-8.1-presetup of NVIDIA's QEMU (PRESETUP, EXTEND_STATUS). */
export const FRONTENDS = ["standard", "nvidia-presetup"] as const;
export type FrontendKind = (typeof FRONTENDS)[number];

/** The option where it says anything: the standard's front-ends are not named. */
export function namedFrontend(frontend: FrontendKind | undefined): { readonly frontend?: FrontendKind } {
  return frontend === undefined || frontend === "standard" ? {} : { frontend };
}
