//! Random schedules. A failing seed is printed; run it again with `make sim SEED=n`.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use weir_sim::{Faults, World};

fn run(seed: u64) -> World {
    // every fourth: three brokers that stay, so that a majority is two
    let (brokers, faults) = if seed % 4 == 3 { (3, Faults::Crashes) } else { (5, Faults::All) };
    let mut world = World::new(seed, brokers, 3);
    world.run(20_000, faults);
    world.settle();
    world.check();
    world
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|v| v.parse().ok())
}

#[derive(Default)]
struct Sums {
    acknowledged: u64,
    fetched: u64,
    slept: u64,
    faults: BTreeMap<&'static str, u64>,
}

#[test]
fn acknowledged_records_survive_whatever_breaks() {
    let first = number("SEED").unwrap_or(0);
    let end = if number("SEED").is_some() { first + 1 } else { number("RUNS").unwrap_or(100) };
    let (next, failed, sums) = (AtomicU64::new(first), AtomicBool::new(false), Mutex::new(Sums::default()));
    let work = || {
        while !failed.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end {
                return;
            }
            let Ok(world) = catch_unwind(AssertUnwindSafe(|| run(seed))) else {
                failed.store(true, Ordering::Relaxed);
                let commit = Command::new("git").args(["rev-parse", "--short", "HEAD"]).output();
                let commit = commit.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default();
                eprintln!("seed {seed} fails at commit {commit}; again: make sim SEED={seed}");
                return;
            };
            let mut sums = sums.lock().unwrap();
            sums.acknowledged += world.history.acknowledged() as u64;
            sums.fetched += world.fetched;
            sums.slept += world.slept;
            world.faults.iter().for_each(|(kind, n)| *sums.faults.entry(kind).or_default() += n);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    assert!(!failed.load(Ordering::Relaxed), "a seed failed: see above");
    let Sums { acknowledged, fetched, slept, faults } = sums.into_inner().unwrap();
    let count = end - first;
    println!(
        "{count} schedules, {acknowledged} acknowledged records, none lost; {fetched} reads for replicas that were behind; {slept} sleeps; {faults:?}"
    );
    if count >= 100 {
        assert!(fetched > 0, "no replica was ever so far behind that it needed the store");
        let all = [
            "crash",
            "power loss of all",
            "cut",
            "bridge",
            "loss, duplication, reordering",
            "pause",
            "lull",
            "crash of a leader whose group sleeps",
            "slow disk",
            "failed sync",
            "full disk",
            "clock jump",
            "lost volume",
            "copy of a volume",
            "rolled-back volume",
            "data set aside",
            "flipped bit",
            "drained broker",
        ];
        all.iter().for_each(|kind| assert!(faults.contains_key(kind), "{kind}: never happened"));
    }
}

/// Seeds that found something when they were new, each with what: run again, whatever the code has become since.
#[test]
fn seeds_that_found_something_pass() {
    let found = [
        (272, "a checkpoint whose answer was lost was never sent again"),
        (1265, "a change that waited for a broker which lost its disk again never ended"),
        (
            2777,
            "a leader whose disk was lost just after it had told that a membership was reached left two that needed the one taken out",
        ),
        (6373, "a leader that its own group had removed panicked at the next acknowledgement"),
        (
            725,
            "a replica of the metadata that was replaced, and could be read again, never made room for its successor",
        ),
        (7558, "leadership went back and forth between a replica that was to leave and those that were not to lead"),
    ];
    for (seed, what) in found {
        assert!(catch_unwind(|| run(seed)).is_ok(), "seed {seed}: {what}");
    }
}

#[test]
fn one_seed_is_one_schedule() {
    for seed in [7, 8] {
        let (one, other) = (run(seed), run(seed));
        assert_eq!((one.trace, &one.faults), (other.trace, &other.faults));
        assert_ne!(one.trace, run(seed + 4).trace);
    }
}
