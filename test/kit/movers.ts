/**
 * The ways to move a VF's state, each with the options of vfe-softvf under which the daemon chooses it. What a test says
 * of a VF without naming a mover holds for all of them.
 */
export const MOVERS = [
  { mover: "registers", migration: "none" },
  { mover: "vendor", migration: "vendor" },
] as const;

export type Migration = (typeof MOVERS)[number]["migration"];
