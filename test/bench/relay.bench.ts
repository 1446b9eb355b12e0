import { type Benchmark, figure } from "./kit.ts";
import { benchCpu, buildProgram, output } from "./native.ts";

const RUNS = 9;
const SECONDS = "0.3";
const RELAY = ["relay", "forwarder", "io-ring", "priority", "eventfd-signal", "epoll-thread", "guard", "thread"];

/**
 * What the relay costs a doorbell: a round trip through it (three wake-ups) by one between two threads (two), all on
 * one CPU. `epoll` is the relay on kernels that do not forward. A third thread that does nothing but read and write
 * says how much of that is the scheduler's.
 */
export default {
  name: "relay",
  async run() {
    const [program, cpu] = [await buildProgram("round-trip", RELAY), await benchCpu()];
    /** @returns microseconds */
    const roundTrip = async (way: "bare" | "relay" | "epoll" | "thread") =>
      Number(await output([program, way, cpu, SECONDS])) / 1000;
    const bare: number[] = [];
    const relayed: number[] = [];
    const byEpoll: number[] = [];
    const threads: number[] = [];
    for (let run = 0; run < RUNS; run++) {
      bare.push(await roundTrip("bare"));
      relayed.push(await roundTrip("relay"));
      byEpoll.push(await roundTrip("epoll"));
      threads.push(await roundTrip("thread"));
    }
    const byBare = (times: readonly number[]) => times.map((time, run) => time / bare[run]!);
    return [
      figure("relay.round_trip_ratio", byBare(relayed), "ratio", { at: "most", value: 1.6 }),
      figure("relay.epoll_round_trip_ratio", byBare(byEpoll), "ratio"),
      figure("relay.three_threads_ratio", byBare(threads), "ratio"),
      figure("relay.round_trip_us", relayed, "µs"),
      figure("relay.bare_round_trip_us", bare, "µs"),
    ];
  },
} satisfies Benchmark;
