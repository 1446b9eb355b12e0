import Type from "typebox";
import { asError, VhostdError } from "../../base/errors.ts";
import type { Logger } from "../../base/log.ts";
import { parseStored } from "../../base/stored.ts";
import type { OwnedFd } from "../../native/fd.ts";
import { fileInfo, memfd, pread, pwrite } from "../../native/sys.ts";
import type { Keeper, Stored } from "../keeper.ts";
import { closing } from "../record.ts";

/** Of the record with the page. */
export const ATTEMPTS_KEY = "adoption";
const Schema = Type.Object({ keys: Type.Array(Type.String()) });

/** What is done with each record, in this order: bytes of the page beside each other. */
const STAGES = ["open", "take up"] as const;
export type Stage = (typeof STAGES)[number];

/** Processes that may die of one thing before it is not tried any more. */
const DEATHS_MAX = 3;
/** As many as a byte of the page has room for. */
const COUNT_MAX = 0xff;

/** What is not tried any more, because daemons died of it. */
export class DeadlyRecord extends VhostdError {
  constructor(key: string, deaths: number) {
    super("invalid", `the daemon has died ${deaths} times in a row while it took up ${key}`, {
      fix: "report it, with what the daemon wrote when it died",
    });
    this.name = "DeadlyRecord";
  }
}

/**
 * How many processes in a row have died over each of the records that they took up: a count by key and stage, in a page that
 * the keeper has. It is written before something is begun and cleared when it is done, whatever came of it.
 */
export class Attempts implements Disposable {
  /** Where nothing is taken up. */
  static readonly none = new Attempts(new Map(), new Uint8Array(0), undefined);

  /** Counts of what this process has begun with, as they were before, by place in the page. */
  private readonly underWay = new Map<number, number>();

  /** @param page taken */
  private constructor(
    private readonly places: ReadonlyMap<string, number>,
    private readonly counts: Uint8Array,
    private readonly page: OwnedFd | undefined,
  ) {}

  /** With what the process before has counted. @param keys of all that is to be taken up @throws what the keeper does */
  static async open(keeper: Keeper, keys: readonly string[], log: Logger): Promise<Attempts> {
    if (keys.length === 0) return Attempts.none;
    const before = await readCounts(keeper, log);
    const none = new Uint8Array(STAGES.length);
    const counts = Uint8Array.from(keys.flatMap((key) => [...(before.get(key) ?? none)]));
    using undo = new DisposableStack();
    const page = undo.use(memfd("vfe-vhostd-attempts", counts.length));
    pwrite(page.number, counts, 0);
    await keeper.put(ATTEMPTS_KEY, () => ({ record: { keys: [...keys] }, fds: new Map([["page", page.number]]) }));
    undo.move();
    const places = new Map(keys.map((key, index) => [key, index * STAGES.length]));
    return new Attempts(places, counts, page);
  }

  /** Processes that died at it, one after the other. */
  deaths(stage: Stage, key: string): number {
    return this.counts[this.placeOf(stage, key)] ?? 0;
  }

  /** @throws DeadlyRecord where it is not to be tried again */
  check(stage: Stage, key: string): void {
    const deaths = this.deaths(stage, key);
    if (deaths >= DEATHS_MAX) throw new DeadlyRecord(key, deaths);
  }

  /** @throws DeadlyRecord where it is not to be tried again, or what `work` does */
  async during<T>(stage: Stage, key: string, work: () => Promise<T>): Promise<T> {
    this.check(stage, key);
    const place = this.placeOf(stage, key);
    const deaths = this.deaths(stage, key);
    this.underWay.set(place, deaths);
    this.write(place, deaths + 1);
    try {
      return await work();
    } finally {
      this.underWay.delete(place);
      this.write(place, 0);
    }
  }

  /** This process ends, and does not die of what is under way. */
  withdraw(): void {
    for (const [place, deaths] of this.underWay) this.write(place, deaths);
  }

  /** Everything was taken up. @throws what the keeper does */
  async close(keeper: Keeper): Promise<void> {
    if (this.page === undefined) return;
    this[Symbol.dispose]();
    await keeper.delete(ATTEMPTS_KEY);
  }

  [Symbol.dispose](): void {
    this.page?.[Symbol.dispose]();
  }

  private placeOf(stage: Stage, key: string): number {
    return (this.places.get(key) ?? Number.NaN) + STAGES.indexOf(stage);
  }

  /** One byte: it is written or not, however the process dies. */
  private write(place: number, count: number): void {
    if (this.page === undefined || Number.isNaN(place)) return;
    this.counts[place] = Math.min(count, COUNT_MAX);
    pwrite(this.page.number, this.counts.subarray(place, place + 1), place);
  }
}

/** By key, a byte for each stage. What cannot be understood counts nothing: it keeps nothing from being tried. */
async function readCounts(keeper: Keeper, log: Logger): Promise<ReadonlyMap<string, Uint8Array>> {
  try {
    const stored = await keeper.get(ATTEMPTS_KEY);
    return stored === undefined ? new Map() : countsOf(stored);
  } catch (error) {
    log.warn("what daemons have died of is not known", asError(error));
    return new Map();
  }
}

/** Closes the fds. @throws VhostdError, SystemError */
function countsOf({ record, fds }: Stored): ReadonlyMap<string, Uint8Array> {
  using _ = closing(fds);
  const { keys } = parseStored(Schema, record, "the record of what daemons died of");
  const page = fds.get("page");
  if (page === undefined) throw new VhostdError("invalid", "the record of what daemons died of has no page");
  const { kind, filesystem, size } = fileInfo(page.number);
  const expected = keys.length * STAGES.length;
  if (kind !== "regular" || filesystem !== "tmpfs" || size !== expected) {
    const seen = `of kind ${kind} on ${filesystem} with ${size} bytes`;
    throw new VhostdError("invalid", `the page of attempts is ${seen}, must be a memory file of ${expected}`);
  }
  const bytes = new Uint8Array(expected);
  pread(page.number, bytes, 0);
  return new Map(keys.map((key, index) => [key, bytes.subarray(index * STAGES.length, (index + 1) * STAGES.length)]));
}
