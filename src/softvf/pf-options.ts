import { VhostdError } from "../base/errors.ts";
import type { SoftOption, SoftOptionValue, SoftOptionValues } from "../plugin.ts";
import { TrackingMode, type TrackingModeName } from "../virtio/admin/vendor.ts";
import { DelayPlan, FaultPlan } from "./admin-faults.ts";
import { optionFlag } from "./class-options.ts";

/** How the PF's state can be moved: by the vendor's commands, or not at all. */
const MIGRATIONS = ["vendor", "none"] as const;
type Migration = (typeof MIGRATIONS)[number];

/**
 * How a VF becomes quiesced and frozen. `drain`: quiesced when all that it has taken is given back. `list`: at once, and
 * its saved state lists what is in flight. `hold`: at once, and nothing is listed, as firmware does that cannot.
 */
const FREEZE_BEHAVIOURS = ["drain", "list", "hold"] as const;
export type FreezeBehaviour = (typeof FREEZE_BEHAVIOURS)[number];

const TRACKING_MODES = Object.keys(TrackingMode) as TrackingModeName[];

/** Options of the PF itself, beside those of its class, which its VFs have. */
export const PF_OPTIONS = {
  migration: {
    type: "string",
    description: `how the PF moves the state of its VFs: ${MIGRATIONS.join(" or ")}`,
    default: "vendor",
  },
  freeze: {
    type: "string",
    description: "drain: a VF completes what it has taken; list, hold: it stops at once, and says what it had, or not",
    default: "drain",
    live: true,
  },
  tracking: {
    type: "string",
    description: "how VFs mark the pages that they write: modes that are offered, with commas, or none",
    default: TRACKING_MODES.map(optionFlag).join(","),
  },
  adminDelay: {
    type: "string",
    description: "admin commands take at least: MS for all, COMMAND=MS, several with commas",
    default: "",
    live: true,
  },
  adminFault: {
    type: "string",
    description: "admin commands go wrong: COMMAND[@VF]:retry|fail|silence[:COUNT], several with commas",
    default: "",
    live: true,
  },
} as const satisfies Readonly<Record<string, SoftOption>>;

/** What a PF does, by its options: those that are live change. */
export class PfSettings {
  readonly migration: Migration;
  /** Offered. */
  readonly tracking: ReadonlySet<TrackingModeName>;
  freeze: FreezeBehaviour;
  delays: DelayPlan;
  faults: FaultPlan;

  /** @param given by name; what is left out has its default. @throws VhostdError badArguments */
  constructor(given: SoftOptionValues = {}) {
    const value = (name: keyof typeof PF_OPTIONS) => given[name] ?? PF_OPTIONS[name].default;
    this.migration = oneOf("migration", MIGRATIONS, value("migration"));
    this.tracking = trackingModes(String(value("tracking")));
    this.freeze = oneOf("freeze", FREEZE_BEHAVIOURS, value("freeze"));
    this.delays = DelayPlan.parse(String(value("adminDelay")));
    this.faults = FaultPlan.parse(String(value("adminFault")));
  }

  /** @throws VhostdError badArguments where `set` would not take the value */
  check(option: string, value: SoftOptionValue): void {
    new PfSettings({ [option]: value });
  }

  /** @throws VhostdError badArguments */
  set(option: string, value: SoftOptionValue): void {
    const { freeze, delays, faults } = new PfSettings({ [option]: value });
    if (option === "freeze") this.freeze = freeze;
    if (option === "adminDelay") this.delays = delays;
    if (option === "adminFault") this.faults = faults;
  }
}

/** @throws VhostdError badArguments */
function trackingModes(text: string): Set<TrackingModeName> {
  if (text === "none") return new Set();
  return new Set(
    text.split(",").map((word) => {
      const mode = TRACKING_MODES.find((each) => optionFlag(each) === word.trim());
      if (mode !== undefined) return mode;
      const known = TRACKING_MODES.map(optionFlag).join(", ");
      throw new VhostdError("badArguments", `option tracking has "${word}", must be none or some of ${known}`);
    }),
  );
}

function oneOf<T extends string>(option: string, known: readonly T[], value: SoftOptionValue): T {
  const found = known.find((each) => each === value);
  if (found !== undefined) return found;
  throw new VhostdError("badArguments", `option ${option} is "${value}", must be one of ${known.join(", ")}`);
}
