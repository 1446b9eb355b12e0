import { VhostdError } from "../base/errors.ts";
import type { DirtyPagesCommandName, MigrationCommandName } from "../virtio/admin/vendor.ts";

export type AdminCommandName = MigrationCommandName | DirtyPagesCommandName;

/** Commands of the admin virtqueue by the words that people use for them. */
const COMMAND_WORDS = {
  identity: "identity",
  status: "getStatus",
  modify: "modifyStatus",
  pending: "pendingBytes",
  save: "save",
  restore: "restore",
  "tracking-identity": "trackingIdentity",
  "start-tracking": "startTracking",
  "stop-tracking": "stopTracking",
  "pending-map": "pendingMap",
  "report-map": "reportMap",
} as const satisfies Readonly<Record<string, AdminCommandName>>;

/** Not on a VF. */
const OF_THE_PF: readonly AdminCommandName[] = ["identity", "trackingIdentity"];

/** What a command is made to do: fail with or without the hope of success, or never be answered. It has no effect. */
const FAULTS = ["retry", "fail", "silence"] as const;
export type Fault = (typeof FAULTS)[number];

const LONGEST_DELAY = 3_600_000;
const VF_MAX = 0xffff;
const COUNT_MAX = 1_000_000;

interface Rule {
  readonly command: AdminCommandName;
  /** VF's number from 0; undefined for all. */
  readonly vf: number | undefined;
  readonly fault: Fault;
  /** How often still. */
  left: number;
}

/** Faults as an option says them: `save@1:retry:2,restore:silence`. The first that fits a command is taken. */
export class FaultPlan {
  private constructor(private readonly rules: readonly Rule[]) {}

  /** @throws VhostdError badArguments */
  static parse(text: string): FaultPlan {
    return new FaultPlan(items(text).map(parseRule));
  }

  /** What this command is to do, once. */
  take(command: AdminCommandName, vf: number | undefined): Fault | undefined {
    const fits = (rule: Rule) => rule.command === command && (rule.vf === undefined || rule.vf === vf) && rule.left > 0;
    const rule = this.rules.find(fits);
    if (rule === undefined) return undefined;
    rule.left--;
    return rule.fault;
  }
}

/** How long commands take at least, as an option says it: `5`, or `save=50,restore=20`. Milliseconds. */
export class DelayPlan {
  private constructor(private readonly delays: ReadonlyMap<AdminCommandName | "all", number>) {}

  /** @throws VhostdError badArguments */
  static parse(text: string): DelayPlan {
    return new DelayPlan(
      new Map(
        items(text).map((item) => {
          const [, word, number = ""] = /^(?:([a-z-]+)=)?(\d+)$/.exec(item) ?? [];
          const milliseconds = number === "" ? Number.NaN : Number(number);
          if (!(milliseconds <= LONGEST_DELAY)) {
            throw refuse("admin-delay", item, `MS or COMMAND=MS, at most ${LONGEST_DELAY}`);
          }
          return [word === undefined ? "all" : commandOf("admin-delay", word), milliseconds] as const;
        }),
      ),
    );
  }

  of(command: AdminCommandName): number {
    return this.delays.get(command) ?? this.delays.get("all") ?? 0;
  }
}

function parseRule(item: string): Rule {
  const [, word = "", vf, fault = "", count] = /^([a-z-]+)(?:@(\d{1,5}))?:([a-z]+)(?::(\d{1,7}))?$/.exec(item) ?? [];
  const known = FAULTS.find((name) => name === fault);
  if (known === undefined) throw refuse("admin-fault", item, `COMMAND[@VF]:${FAULTS.join("|")}[:COUNT]`);
  const command = commandOf("admin-fault", word);
  if (vf !== undefined && (OF_THE_PF.includes(command) || Number(vf) > VF_MAX)) {
    throw refuse("admin-fault", item, `a command on a VF from 0 to ${VF_MAX}`);
  }
  const left = count === undefined ? Number.POSITIVE_INFINITY : Number(count);
  if (left < 1 || (count !== undefined && left > COUNT_MAX)) {
    throw refuse("admin-fault", item, `a count from 1 to ${COUNT_MAX}`);
  }
  return { command, vf: vf === undefined ? undefined : Number(vf), fault: known, left };
}

function commandOf(option: string, word: string): AdminCommandName {
  const command = Object.entries(COMMAND_WORDS).find(([name]) => name === word)?.[1];
  if (command !== undefined) return command;
  throw refuse(option, word, `one of ${Object.keys(COMMAND_WORDS).join(", ")}`);
}

function items(text: string): string[] {
  return text === "" ? [] : text.split(",").map((item) => item.trim());
}

function refuse(option: string, seen: string, expected: string): VhostdError {
  return new VhostdError("badArguments", `option ${option} has "${seen}", must be ${expected}`);
}
