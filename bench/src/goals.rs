//! What Weir is to reach, and why it does not where it does not.

/// A bound of a figure.
pub(crate) enum Bound {
    AtLeast(f64),
    AtMost(f64),
    /// So many times the figure of the same name of another system.
    Times(f64, &'static str),
}

/// A goal.
pub(crate) struct Goal {
    pub(crate) figure: &'static str,
    pub(crate) bound: Bound,
    /// What was measured of the reason and tried, where it is not reached.
    pub(crate) note: &'static str,
}

const fn goal(figure: &'static str, bound: Bound, note: &'static str) -> Goal {
    Goal { figure, bound, note }
}

use Bound::{AtLeast, AtMost, Times};

pub(crate) const WRITTEN_TWICE: &str = "each record is written twice on each replica, into the write-ahead log and, when a memtable is flushed, into a blob \
    file; where the disk is slow that is the bound. RocksDB's way to write large values to blob files at once \
    (enable_blob_direct_write) loses what was not flushed when the power goes";
const CORES: &str = "client and broker share two cores. Tried: mimalloc, 4 to 12% slower; jemalloc, \
    which stayed for the memory it gives back, as much slower in one hour and the same processor time in turns in another (medians of six); \
    malloc with huge pages and without giving \
    memory back, no difference beyond chance";
const BESIDE: &str = "publisher, reader and broker share two cores, and each has its part: the reader read at 520,000 to 590,000/s meanwhile. \
    Reading with what publishing leaves would be a reader that is behind for good. Tried: backlogs read by threads of the lowest \
    priority: 72, 62 and 61% in one hour with 66, 64 and 62% without";
const READING: &str = "client and broker share two cores, and a byte is copied or checked some eight times between disk and reader. What was \
    written past the page cache is read from the disk, an eighth slower than out of the cache. Answers of 1 MiB instead of 4: \
    1 KiB 920,000 and 1,070,000 → 1,290,000 and 1,220,000/s in one hour; a client with one worker instead of two, in turns: 660,000, \
    669,000 and 826,000 → 700,000, 731,000 and 907,000/s in another. Tried: mimalloc, a fifth slower; jemalloc, which stayed, a fifth slower in one \
    hour and the same processor time in turns in another (medians of twelve)";
const SYNCS: &str = "three brokers sync one disk at one time, and six threads wake one another in turn, 25 to 40 µs each. On this machine three \
    programs that sync 4 KiB each at one time wait 290 µs (median), one alone 190, and 16 bytes over TCP to another process and back take \
    64. On another one, where a sync takes 75 and NATS from three brokers 206 µs, the version before had 306. Tried: write-ahead logs \
    that are used again (a fifth less of a sync), which exclude the strict recovery; commits told with what comes next instead of at \
    once, which stayed: 384 → 333 and 607 → 574 µs, with and without in turns, on two machines";
const WAKES: &str = "threads on other processors are woken in turn, 25 to 40 µs each on such a machine: a round trip of ZeroMQ between two \
    processes takes about 50. With all on one processor it was 53 µs from publisher to reader. Tried: what goes to one connection held \
    until all that can run has run, which is one write of the broker for each message instead of two, and one wake-up fewer: 67 µs \
    where it was 67 (means of nine, in turns). On another machine, where NATS from three brokers took 206 µs, the version before had 173 \
    from three and 68 over a Unix socket. Commits told with what comes next, which stayed: 166 → 139 there, 309 → 305 µs here, with and \
    without in turns";
const FLUSH: &str = "the syncs of three brokers wait for one disk, to which 96 MiB/s for each leader are written beside them for the broker that is \
    filled again; without that see *all brokers whole*. In the pauses both processors are idle, and both other brokers wait in a sync \
    (scheduler's trace). It is not the third vote: with that broker stopped, and nothing filled, it was 4.6 and 4.7 ms where all whole \
    had 4.8 and 5.3. With the data of the broker that is filled in memory it was 7.7 to 12.8 ms, beside 10.4 to 20 with them on the \
    disk. Tried: filling it at a third of the speed (8.5 and 9.5 ms where it was 8.0 and 10.3), old entries in pieces of 256 KiB spread \
    over time instead of some MiB every 50 ms (11.4 to 15.1 ms where it was 10.4 to 20), memtables of 8 MiB, pieces of 64 KiB; what \
    may be read coming with time instead of every 50 ms, which stayed: 8.0 to 12.1 ms where it was 8.3 to 11.5";
const IN_PROCESS: &str = "without a socket the calls still are gRPC messages, encoded and decoded, five tasks take them on in turn, and the \
    write-ahead log is written before the acknowledgement. The profile is flat: no function takes more than 3%. Tried: batches taken and \
    answers read in the answers' own tasks, three of six changes of task fewer: 13 µs where it was 12";

pub(crate) const GOALS: &[Goal] = &[
    goal("three 100 B", AtLeast(600_000.0), WRITTEN_TWICE),
    goal("three 100 B", Times(2.0, "Kafka"), WRITTEN_TWICE),
    goal("three 1 KiB", AtLeast(90_000.0), WRITTEN_TWICE),
    goal("three 1 KiB", Times(1.6, "Kafka"), WRITTEN_TWICE),
    goal("one 100 B", AtLeast(2_000_000.0), CORES),
    goal("one 1 KiB", AtLeast(250_000.0), WRITTEN_TWICE),
    goal("read 100 B", AtLeast(4_000_000.0), READING),
    goal("read 1 KiB", AtLeast(1_000_000.0), READING),
    goal("one 1 KiB while another reads, % of alone", AtLeast(80.0), BESIDE),
    goal("latency three p50 µs", AtMost(450.0), SYNCS),
    goal("latency three, memory p50 µs", AtMost(150.0), WAKES),
    goal("to consumer over a Unix socket p50 µs", AtMost(55.0), WAKES),
    goal("to consumer in process p50 µs", AtMost(10.0), IN_PROCESS),
    goal("at 10,000/s p99 µs", AtMost(5_000.0), FLUSH),
    goal("at 10,000/s p99.9 µs", AtMost(20_000.0), FLUSH),
    goal("start with 10 GiB ms", AtMost(1_000.0), ""),
    goal("idle broker MiB", AtMost(40.0), ""),
    goal("10,000 idle partitions MiB", AtMost(300.0), ""),
    goal("10,000 idle partitions, % of a core", AtMost(3.0), ""),
    goal(
        "1,000 busy partitions, % of six",
        AtLeast(80.0),
        "a publisher opens a thousand streams, and a thousand groups wake and sleep again between two batches: with records that go on for \
         longer it is more",
    ),
];
