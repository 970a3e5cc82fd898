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

pub(crate) const GOALS: &[Goal] = &[
    goal("three 100 B", AtLeast(600_000.0), ""),
    goal("three 100 B", Times(2.0, "Kafka"), ""),
    goal("three 1 KiB", AtLeast(90_000.0), ""),
    goal("three 1 KiB", Times(1.6, "Kafka"), ""),
    goal("one 100 B", AtLeast(2_000_000.0), ""),
    goal("one 1 KiB", AtLeast(250_000.0), ""),
    goal("read 100 B", AtLeast(4_000_000.0), ""),
    goal("read 1 KiB", AtLeast(1_000_000.0), ""),
    goal("one 1 KiB while another reads, % of alone", AtLeast(80.0), ""),
    goal("latency three p50 µs", AtMost(450.0), ""),
    goal("latency three, memory p50 µs", AtMost(150.0), ""),
    goal("to consumer over a Unix socket p50 µs", AtMost(55.0), ""),
    goal("to consumer in process p50 µs", AtMost(10.0), ""),
    goal("at 10,000/s p99 µs", AtMost(5_000.0), ""),
    goal("at 10,000/s p99.9 µs", AtMost(20_000.0), ""),
    goal("start with 10 GiB ms", AtMost(1_000.0), ""),
    goal("idle broker MiB", AtMost(40.0), ""),
    goal("10,000 idle partitions MiB", AtMost(300.0), ""),
    goal("10,000 idle partitions, % of a core", AtMost(3.0), ""),
    goal("1,000 busy partitions, % of six", AtLeast(80.0), ""),
];
