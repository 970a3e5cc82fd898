//! Weir beside others on one machine: the same work, each with its own client, in turns; and what Weir's own work costs.
//! `make bench-peers` runs it and writes docs/benchmarks.md.

mod active;
mod costs;
mod goals;
mod kafka;
mod nats;
mod rabbit;
mod report;
mod rocket;
mod run;
mod weir;

use clap::Parser;
use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Weir beside others on this machine.
#[derive(Parser)]
#[command(after_help = "Examples:
  weir-bench-peers --weir target/debug/weir --out docs
  weir-bench-peers --weir target/debug/weir --only weir,kafka --rounds 1 --scale 0.1")]
struct Args {
    /// The program `weir`.
    #[arg(long)]
    weir: PathBuf,
    /// Folder the page and its picture are written to; none prints figures only.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Folder in which what is fetched and built of others is kept.
    #[arg(long)]
    cache: PathBuf,
    /// Rounds; each runs every system once.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Only these systems.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Also, once, what grows with the work: partitions, producers, sizes, backlogs, and what idles.
    #[arg(long)]
    costs: bool,
    /// Part of the usual number of records.
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
}

/// How much work is done.
struct Load {
    scale: f64,
    /// Records sent one by one.
    singles: u64,
}

impl Load {
    /// Name, bytes and number of the records of each throughput run.
    fn sizes(&self) -> [(&'static str, usize, u64); 2] {
        let records = |n: f64| (n * self.scale) as u64;
        [("100 B", 100, records(5e6)), ("1 KiB", 1_024, records(1e6))]
    }
}

/// What a run gave, by name.
#[derive(Default)]
struct Figures(BTreeMap<String, f64>);

impl Figures {
    fn put(&mut self, name: &str, value: impl Into<Option<f64>>) {
        let Some(value) = value.into() else { return };
        eprintln!("    {name}: {value:.0}");
        self.0.insert(name.to_owned(), value);
    }

    fn get(&self, name: &str) -> Option<f64> {
        self.0.get(name).copied()
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

/// A system that is measured.
struct System {
    name: &'static str,
    settings: &'static str,
    figures: fn(&Args, &Load) -> anyhow::Result<Figures>,
}

const SYSTEMS: [System; 6] = [
    System { name: "Weir", settings: weir::SETTINGS, figures: |a, l| weir::figures(&a.weir, l) },
    System { name: "Kafka", settings: kafka::SETTINGS, figures: |a, l| kafka::figures(&a.cache, l) },
    System { name: "NATS", settings: nats::SETTINGS, figures: |a, l| nats::figures(&a.cache, l) },
    System { name: "RabbitMQ", settings: rabbit::SETTINGS, figures: |a, l| rabbit::figures(&a.cache, l) },
    System { name: "RocketMQ", settings: rocket::SETTINGS, figures: |a, l| rocket::figures(&a.cache, l) },
    System { name: "ActiveMQ", settings: active::SETTINGS, figures: |a, l| active::figures(&a.cache, l) },
];

/// Processor and memory, for the page.
fn machine() -> String {
    let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, |n| n.get());
    let memory = run::number_after(&read(Path::new("/proc/meminfo")), "MemTotal:").unwrap_or(0.0) / 1024.0 / 1024.0;
    let disk = disk().map_or(String::new(), |(sync, rate)| {
        format!(" (a sync of 4 KiB takes {sync:.0} µs, median; writes of 384 KiB, each synced, {rate:.0} MB/s)")
    });
    format!("{cores} shared cores, {memory:.0} GiB of memory and one disk{disk}")
}

/// What the disk can do, beside which all else is to be seen: the median of a sync, µs, and MB/s of larger writes.
fn disk() -> std::io::Result<(f64, f64)> {
    let mut file = tempfile::tempfile()?;
    let mut write = |bytes: usize| {
        let block = vec![b'x'; bytes];
        let begun = Instant::now();
        file.write_all(&block)?;
        file.sync_data()?;
        std::io::Result::Ok(begun.elapsed().as_secs_f64())
    };
    let mut syncs: Vec<f64> = (0..500).map(|_| write(4 << 10)).collect::<Result<_, _>>()?;
    syncs.sort_by(f64::total_cmp);
    let large: Vec<f64> = (0..500).map(|_| write(384 << 10)).collect::<Result<_, _>>()?;
    Ok((syncs[250] * 1e6, (500 * (384 << 10)) as f64 / 1e6 / large.iter().sum::<f64>()))
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let load = Load { scale: args.scale, singles: (5_000.0 * args.scale) as u64 };
    let wanted = |s: &&System| args.only.is_empty() || args.only.iter().any(|o| o.eq_ignore_ascii_case(s.name));
    let systems: Vec<&System> = SYSTEMS.iter().filter(wanted).collect();
    anyhow::ensure!(!systems.is_empty(), "--only names none of: Weir, Kafka, NATS, RabbitMQ, RocketMQ, ActiveMQ");
    let part = if args.scale == 1.0 { String::new() } else { format!(", {} of the usual records", args.scale) };
    let machine = machine() + &part;
    let begun = Instant::now();
    let mut runs: BTreeMap<&'static str, Vec<Figures>> = BTreeMap::new();
    let write = |runs: &_, costs: Option<&costs::Costs>| match &args.out {
        Some(folder) => report::write(folder, &systems, runs, costs, &machine),
        None => Ok(()),
    };
    for round in 1..=args.rounds {
        for system in &systems {
            eprintln!("round {round} of {}, {}, {:.0} s", args.rounds, system.name, begun.elapsed().as_secs_f64());
            match (system.figures)(&args, &load) {
                Ok(figures) => runs.entry(system.name).or_default().push(figures),
                // Weir may lose nothing; another's client that hangs once is no reason to measure all anew
                Err(error) if system.name != "Weir" => {
                    eprintln!("    {} left out of this round: {error:#}", system.name)
                }
                Err(error) => return Err(error),
            }
        }
        write(&runs, None)?; // what ends early leaves a page of the rounds before
    }
    if args.costs { write(&runs, Some(&costs::measure(&args.weir, args.scale)?)) } else { Ok(()) }
}
