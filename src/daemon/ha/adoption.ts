import type { Deadline } from "../../base/deadline.ts";
import { asError, sentence, VhostdError } from "../../base/errors.ts";
import type { Json } from "../../base/json.ts";
import type { Logger } from "../../base/log.ts";
import type { OwnedFd } from "../../native/fd.ts";
import { type PciAddress, parsePciAddress } from "../../pci/address.ts";
import type { AdoptionPolicy, AdoptionTrouble } from "../../plugin.ts";
import type { Keeper, Stored } from "../keeper.ts";
import { NO_RINGS } from "../open-rings.ts";
import type { LeftVf } from "../presence.ts";
import { closing, RECORD_VERSION } from "../record.ts";
import { type LeftFunction, type VfOptions, vfKey } from "../vf-parts.ts";
import { ATTEMPTS_KEY, Attempts, DeadlyRecord, type Stage } from "./attempts.ts";
import { failedKey, keepFailed, keepHollow, keepLeft, readFailed } from "./failed-vf.ts";
import { members, type OpenedVf, readStoredVf, type StoredVf, sessionDeaths, TroubledRecord } from "./stored-vf.ts";

/** So many are taken up between two questions whose front-end waits. */
const ASKED_ANEW = 16;
/** In the place of a key: what is done with all domains at once. */
const ALL_DOMAINS = "all domains";

/** What makes live objects of records. Each takes the fds it is given, and throws where the record does not fit. */
export interface AdoptionHost {
  readonly keeper: Keeper;
  readonly log: Logger;
  readonly policy: AdoptionPolicy;
  revivePf(record: Json, fds: Map<string, OwnedFd>, deadline: Deadline): Promise<void>;
  reviveDomain(record: Json, fds: Map<string, OwnedFd>): void;
  /** All domains are there: what an earlier process had begun in them is brought to an end. */
  takeUpDomains(deadline: Deadline): Promise<void>;
  /** Its function is in its domain again. */
  openVf(stored: StoredVf): Promise<LeftFunction>;
  reviveVf(stored: OpenedVf): Promise<void>;
  /** All VFs are there: memory of those that are not is let go. */
  pruneDomains(): Promise<void>;
  /** PFs that have vanished are attached anew, before their VFs are. Never rejects. */
  renewPfs(others: readonly PciAddress[]): Promise<void>;
  /** As an operator adds it, in its place that waits. */
  attachVf(options: VfOptions, rings: Json | undefined): Promise<void>;
  /** It waits to be taken up; with a reason: it cannot be. */
  leaveVf(left: LeftVf): void;
}

/**
 * Whether an earlier process may have died of it: while it was taken up, or over its session afterwards. In this order they are
 * taken up: a session that kills is to find nobody else under way.
 */
const SUSPICIONS = ["none", "record", "session"] as const;
type Suspicion = (typeof SUSPICIONS)[number];

interface Waiting {
  readonly stored: OpenedVf;
  readonly suspicion: Suspicion;
  asked: boolean;
  frontEndWaits: boolean;
}

interface Afresh {
  readonly key: string;
  readonly options: VfOptions;
  readonly rings: Json | undefined;
}

/** Takes up what an earlier process has left with the keeper: PFs, DMA domains, then VFs, in the order that matters. */
export class Adoption {
  private readonly waiting = new Map<PciAddress, Waiting>();
  private readonly underWay = new Map<PciAddress, Promise<void>>();
  /** Those that are to be attached as if they had never been here. */
  private readonly afresh: Afresh[] = [];
  private readonly done = Promise.withResolvers<void>();
  /** Whose records are of another version. */
  private readonly otherPfs: PciAddress[] = [];
  /** Resolves when the next one is begun with. */
  private turn = Promise.withResolvers<void>();
  private turns = 0;
  /** VFs that go on as they were left. */
  private taken = 0;
  private attempts = Attempts.none;
  /** Another process goes on with what waits. */
  private leaving = false;

  constructor(private readonly host: AdoptionHost) {}

  /** PFs and domains are taken up, VFs wait when this resolves. @throws what the keeper does */
  async collect(deadline: Deadline): Promise<void> {
    const { keeper } = this.host;
    const keys = await keeper.list();
    // The page of the process before is read by those who go on counting.
    const others = keys.filter((key) => key !== ATTEMPTS_KEY);
    const all = await Promise.all(others.map(async (key) => [key, await this.get(key)] as const));
    const stored = all.flatMap(([key, one]) => (one === undefined ? [] : [{ key, ...one }]));
    const ofKind = (kind: string) => stored.filter(({ key }) => key.startsWith(`${kind}/`));
    const { host } = this;
    const counted = keys.length === 0 ? [] : [...stored.map(({ key }) => key), ALL_DOMAINS];
    this.attempts = await Attempts.open(keeper, counted, host.log);
    using undo = new DisposableStack();
    undo.use(this.attempts);
    for (const { key, record } of ofKind("pf")) {
      const { version } = members(record);
      if (typeof version === "number" && version !== RECORD_VERSION)
        this.otherPfs.push(parsePciAddress(key.slice("pf/".length)));
    }
    await this.each("open", ofKind("pf"), (one) => {
      return this.reviveOne(one, () => host.revivePf(one.record, one.fds, deadline));
    });
    // Whose VFs they are is known by now.
    for (const one of ofKind("failed")) await this.reviveOne(one, async () => this.showFailed(one, keys));
    for (const one of ofKind("domain")) {
      await this.reviveOne(one, async () => host.reviveDomain(one.record, one.fds));
    }
    await this.each("open", ofKind("vf"), (one) => this.collectVf(one));
    // Functions go on with what is mapped; what cannot be changed is refused when it is to be.
    await this.attempts
      .during("open", ALL_DOMAINS, () => host.takeUpDomains(deadline))
      .catch((error) => host.log.error("not all memory could be taken up", asError(error)));
    undo.move();
  }

  /** Takes up all that wait. Never rejects; what cannot be taken up is logged. */
  async run(): Promise<void> {
    const { keeper, policy, log } = this.host;
    const all = this.waiting.size + this.afresh.length;
    for (const suspicion of SUSPICIONS) {
      // One after the other: who comes after this process is to know of which one it died.
      const workers = suspicion === "none" ? policy.sideBySide : 1;
      await Promise.all(Array.from({ length: workers }, () => this.work(suspicion)));
    }
    // Those that wait have memory here, and nobody is to be told that they are there.
    if (this.leaving) return;
    if (all > 0) log.info(`${this.taken} of ${all} VFs of an earlier process go on`);
    await this.host
      .pruneDomains()
      .catch((error) => log.error("memory of an earlier process stays mapped", asError(error)));
    await this.host.renewPfs(this.otherPfs);
    await this.each("take up", this.afresh, (one) => this.attach(one));
    if (this.leaving) return;
    await this.attempts.close(keeper).catch((error) => log.error("attempts stay counted", asError(error)));
    this.done.resolve();
  }

  /** This process ends in order: none is begun with any more, those that are under way end as far as the deadline lets them. */
  async leave(deadline: Deadline): Promise<void> {
    this.leaving = true;
    await deadline.race(Promise.all(this.underWay.values())).catch(() => {});
    this.attempts.withdraw();
  }

  /** Resolves when all are taken up, or it is known that they cannot be. Never where this process leaves before. */
  get finished(): Promise<void> {
    return this.done.promise;
  }

  /** Takes this one up next. Resolves when it was, whatever came of it; at once where it does not wait. */
  async hurry(address: PciAddress): Promise<void> {
    const waiting = this.waiting.get(address);
    if (waiting !== undefined) waiting.asked = true;
    while (this.waiting.has(address)) await this.turn.promise;
    await this.underWay.get(address);
    if (this.afresh.some(({ options }) => options.address === address)) await this.done.promise;
  }

  /** One that is no record is damaged. @throws what else the keeper does */
  private async get(key: string): Promise<Stored | undefined> {
    try {
      return await this.host.keeper.get(key);
    } catch (error) {
      if (!(error instanceof VhostdError && error.code === "protocol")) throw error;
      return { record: null, fds: new Map() };
    }
  }

  /** Those that an earlier process may have died of come last, one after the other. */
  private async each<T extends { readonly key: string }>(
    stage: Stage,
    list: readonly T[],
    work: (one: T) => Promise<void>,
  ): Promise<void> {
    const isSuspect = ({ key }: T) => this.attempts.deaths(stage, key) > 0;
    if (!this.leaving) await Promise.all(list.filter((one) => !isSuspect(one)).map(work));
    for (const one of list.filter(isSuspect)) if (!this.leaving) await work(one);
  }

  private async showFailed({ record }: Stored, keys: readonly string[]): Promise<void> {
    const left = readFailed(record);
    const { options } = left;
    if (keys.includes(vfKey(options.address))) await this.host.keeper.delete(failedKey(options.address));
    else this.host.leaveVf(left);
  }

  private async reviveOne({ key, fds }: Stored & { readonly key: string }, revive: () => Promise<void>): Promise<void> {
    const { keeper, log } = this.host;
    try {
      await this.attempts.during("open", key, revive);
    } catch (error) {
      closing(fds)[Symbol.dispose]();
      // As long as the keeper has the fds, function and front-end believe that somebody is there.
      await keeper.delete(key);
      log.error(`${key} could not be taken up again`, error);
    }
  }

  private async collectVf({ key, record, fds }: Stored & { readonly key: string }): Promise<void> {
    const { host } = this;
    let stored: StoredVf | undefined;
    try {
      const found = readStoredVf(key, record, fds);
      stored = found;
      host.leaveVf({ options: found.options });
      this.attempts.check("take up", key);
      const suspicion = this.suspicionOf(found);
      const left = await this.attempts.during("open", key, () => host.openVf(found));
      const { address } = found.options;
      this.waiting.set(address, { stored: { ...found, left }, suspicion, asked: false, frontEndWaits: false });
    } catch (error) {
      closing(fds)[Symbol.dispose]();
      const options = error instanceof TroubledRecord ? error.options : stored?.options;
      if (options !== undefined) return await this.fallBack(options, troubleOf(error), asError(error));
      await host.keeper.delete(key);
      host.log.error(`${key} could not be taken up again`, error);
    }
  }

  private suspicionOf({ key, fds }: StoredVf): Suspicion {
    if (this.attempts.deaths("take up", key) > 0) return "record";
    return sessionDeaths(fds) > 0 ? "session" : "none";
  }

  private async work(suspicion: Suspicion): Promise<void> {
    for (;;) {
      if (this.turns++ % ASKED_ANEW === 0) await this.askWhoWaits();
      const list = [...this.waiting.values()].filter((one) => one.suspicion === suspicion);
      if (list.length === 0 || this.leaving) return;
      const next = list[this.nextPlace(list)] ?? list[0]!;
      const { address } = next.stored.options;
      const taken = this.takeUp(next.stored);
      this.underWay.set(address, taken);
      this.waiting.delete(address);
      this.turn.resolve();
      this.turn = Promise.withResolvers();
      await taken;
      this.underWay.delete(address);
      // Requests of people and messages of front-ends have their turn.
      await new Promise(setImmediate);
    }
  }

  private nextPlace(list: readonly Waiting[]): number {
    try {
      return this.host.policy.next(list.map(view));
    } catch (error) {
      this.host.log.warn("the policy of adoption does not say which VF is next", asError(error));
      return 0;
    }
  }

  /** Never rejects. */
  private async takeUp(stored: OpenedVf): Promise<void> {
    try {
      await this.attempts.during("take up", stored.key, () => this.host.reviveVf(stored));
      this.taken++;
    } catch (error) {
      closing(stored.fds)[Symbol.dispose]();
      await this.fallBack(stored.options, troubleOf(error), asError(error));
    }
  }

  private async fallBack(options: VfOptions, trouble: AdoptionTrouble, error: Error): Promise<void> {
    const { host } = this;
    const log = host.log.child(`vf ${options.address}`);
    if (host.policy.fallback(trouble) === "attach") {
      log.warn("could not be taken up as it was left; it is attached anew", error);
      host.leaveVf({ options });
      const rings = error instanceof TroubledRecord ? error.rings : undefined;
      this.afresh.push({ key: vfKey(options.address), options, rings });
      await keepHollow(host.keeper, options, rings ?? NO_RINGS);
    } else {
      log.error("could not be taken up again", error);
      const left = { options, failed: sentence(error) };
      host.leaveVf(left);
      await keepFailed(host.keeper, left);
    }
  }

  private async attach({ key, options, rings }: Afresh): Promise<void> {
    const { host } = this;
    try {
      await this.attempts.during("take up", key, () => host.attachVf(options, rings));
    } catch (error) {
      const log = host.log.child(`vf ${options.address}`);
      log.error("could not be attached anew", error);
      const again = error instanceof DeadlyRecord ? {} : { again: rings ?? NO_RINGS };
      const left = { options, failed: sentence(asError(error)), ...again };
      host.leaveVf(left);
      await keepLeft(host.keeper, left).catch((cause) => log.error("a restart would forget it", asError(cause)));
    }
  }

  private async askWhoWaits(): Promise<void> {
    const list = [...this.waiting.values()];
    if (list.length === 0) return;
    // The connection is the first fd of a record that has one.
    const places = list.map(({ stored }) => [stored.key, 0] as const);
    const found = await this.host.keeper.readable?.(places).catch(() => undefined);
    for (const [index, one] of list.entries()) one.frontEndWaits = found?.[index] === true;
  }
}

function view({ stored, asked, frontEndWaits }: Waiting) {
  return { vf: stored.options.address, asked, frontEndWaits };
}

function troubleOf(error: unknown): AdoptionTrouble {
  if (error instanceof TroubledRecord) return error.trouble;
  if (error instanceof DeadlyRecord) return "deadly";
  if (!(error instanceof VhostdError)) return "damaged";
  if (error.code === "connectionLost" || error.code === "vfNotFound" || error.code === "noDevice") return "device gone";
  return error.code === "pfNotFound" ? "no PF" : "damaged";
}
