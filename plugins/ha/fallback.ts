import type { AdoptionFallback, AdoptionTrouble } from "vfe-vhostd/plugin";

/**
 * What is attached anew costs its VM a reconnect. A record that is damaged, or kills, says nothing of what happens when its
 * function is reset and opened again: a person looks at it first.
 */
const FALLBACKS: Readonly<Record<AdoptionTrouble, AdoptionFallback>> = {
  "other version": "attach",
  "not open": "attach",
  "device gone": "attach",
  "no PF": "fail",
  damaged: "fail",
  deadly: "fail",
};

export function fallback(trouble: AdoptionTrouble): AdoptionFallback {
  return FALLBACKS[trouble];
}
