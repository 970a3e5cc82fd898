//! What grows with the work, and what idles: each measured once.

use crate::report::spread;
use crate::run::{cpu_seconds, resident_mib};
use crate::weir::{Weir, start, start_in, topic};
use anyhow::Context as _;
use serde_json::Value;
use std::path::Path;
use std::time::{Duration, Instant};

/// Throughput and processor time of some work.
pub(crate) struct Row {
    /// What was varied, and how much of it there was.
    pub(crate) what: String,
    /// Records a second.
    pub(crate) rate: f64,
    /// Processor time of clients and brokers for each record, µs.
    pub(crate) cpu_us: f64,
    /// Bytes the brokers handed to the kernel, to files and sockets, for each byte of values.
    pub(crate) handed: f64,
    /// Calls in which they did so, for a thousand records.
    pub(crate) calls: f64,
    /// Syncs of their logs, for a thousand records.
    pub(crate) syncs: f64,
}

/// All of them.
#[derive(Default)]
pub(crate) struct Costs {
    pub(crate) rows: Vec<Row>,
    /// By name, as those of a round.
    pub(crate) figures: crate::Figures,
}

/// Bytes written before a broker is started anew with them.
const KEPT_BYTES: f64 = 10.0 * 1024.0 * 1024.0 * 1024.0;

pub(crate) fn measure(program: &Path, scale: f64) -> anyhow::Result<Costs> {
    let mut costs = Costs::default();
    let count = |n: f64| (n * scale) as u64;
    publishing(program, count, &mut costs)?;
    backlogs(program, count, &mut costs)?;
    many_partitions(program, count, &mut costs)?;
    idle(program, &mut costs)?;
    restart(program, &mut costs)?;
    Ok(costs)
}

impl Costs {
    fn add(
        &mut self,
        weir: &Weir<'_>,
        what: String,
        records: u64,
        work: impl FnOnce() -> anyhow::Result<Value>,
    ) -> anyhow::Result<()> {
        let now = || -> anyhow::Result<_> { Ok((weir.stage.cpu_seconds(), weir.stage.handed(), weir.syncs()?)) };
        let (cpu, (bytes, calls), syncs) = now()?;
        let done = work()?;
        let (cpu_then, (bytes_then, calls_then), syncs_then) = now()?;
        let number = |name: &str| done[name].as_f64().with_context(|| format!("{name} in {done}"));
        let a_record = |n: f64| n / records as f64;
        let row = Row {
            what,
            rate: number("records_per_second")?,
            cpu_us: a_record((cpu_then - cpu + number("cpu_seconds")?) * 1e6),
            handed: (bytes_then - bytes) / number("bytes")?,
            calls: a_record((calls_then - calls) * 1e3),
            syncs: a_record((syncs_then - syncs) * 1e3),
        };
        let Row { what, rate, cpu_us, handed, calls, syncs } = &row;
        eprintln!(
            "    {what}: {rate:.0}/s, {cpu_us:.2} µs, {handed:.2} bytes a byte, of 1,000: {calls:.1} calls, {syncs:.2} syncs"
        );
        self.rows.push(row);
        Ok(())
    }
}

/// One thing varied at a time, around 6 partitions, one producer and 100 bytes, on one broker.
fn publishing(program: &Path, count: impl Fn(f64) -> u64, costs: &mut Costs) -> anyhow::Result<()> {
    let partitions = [1, 10, 100, 1_000];
    let topics: Vec<String> = partitions.iter().map(|n| topic(&format!("of-{n}"), *n, 1, "")).collect();
    let large = topic("large", 6, 1, ", maxMessageBytes: 8Mi");
    let weir = start(program, 1, &[], topics.concat() + &topic("load", 6, 1, "") + &large)?;
    let produce = |topic: &str, bytes: usize, records: u64, producers: u32| {
        let producers = producers.to_string();
        weir.produce(topic, bytes, records, &["--producers", &producers])
    };
    for n in partitions {
        costs.add(&weir, format!("{n} partitions"), count(5e6), || produce(&format!("of-{n}"), 100, count(5e6), 1))?;
    }
    for n in [1, 10, 100] {
        costs.add(&weir, format!("{n} producers"), count(5e6), || produce("load", 100, count(5e6), n))?;
    }
    for (bytes, name) in
        [(100, "100 B"), (1 << 10, "1 KiB"), (10 << 10, "10 KiB"), (100 << 10, "100 KiB"), (1 << 20, "1 MiB")]
    {
        let records = count((2e9 / bytes as f64).min(5e6)).max(100);
        costs.add(&weir, format!("records of {name}"), records, || produce("large", bytes, records, 1))?;
    }
    Ok(())
}

/// A backlog of so many records is read back.
fn backlogs(program: &Path, count: impl Fn(f64) -> u64, costs: &mut Costs) -> anyhow::Result<()> {
    let millions = [1.0, 3.0, 10.0];
    let topics: Vec<String> = millions.iter().map(|n| topic(&format!("of-{n}"), 6, 1, "")).collect();
    let weir = start(program, 1, &[], topics.concat())?;
    for n in millions {
        let (name, records) = (format!("of-{n}"), count(n * 1e6));
        weir.produce(&name, 100, records, &[])?;
        costs.add(&weir, format!("a backlog of {n} million, read"), records, || weir.consume_all(&name, records))?;
    }
    Ok(())
}

/// Three brokers: a thousand busy partitions beside six, in turns.
fn many_partitions(program: &Path, count: impl Fn(f64) -> u64, costs: &mut Costs) -> anyhow::Result<()> {
    let weir = start(program, 3, &[], topic("few", 6, 3, "") + &topic("many", 1_000, 3, ""))?;
    let mut rates = [Vec::new(), Vec::new()];
    for _ in 0..3 {
        for (topic, rates) in ["few", "many"].into_iter().zip(&mut rates) {
            let done = weir.produce(topic, 100, count(5e6), &[])?;
            rates.push(done["records_per_second"].as_f64().context("a rate")?);
        }
    }
    let [few, many] = rates.map(|of| spread(of).map_or(0.0, |(median, ..)| median));
    costs.figures.put("1,000 busy partitions, % of six", many / few * 100.0);
    Ok(())
}

/// Three brokers with ten thousand partitions that nobody uses.
fn idle(program: &Path, costs: &mut Costs) -> anyhow::Result<()> {
    let topics: Vec<String> = (0..20).map(|n| topic(&format!("idle-{n}"), 500, 3, "")).collect();
    let weir = start(program, 3, &[], topics.concat())?;
    // they are placed, led where they should be, and fall asleep: half a minute, and until what is used no longer falls, or two minutes
    let (window, begun) = (Duration::from_secs(10), Instant::now());
    let used = || {
        let before: Vec<f64> = weir.pids().map(cpu_seconds).collect();
        std::thread::sleep(window);
        let used = weir.pids().map(cpu_seconds).zip(before).map(|(now, before)| now - before);
        used.fold(0.0, f64::max) / window.as_secs_f64() * 100.0
    };
    let mut last = used();
    loop {
        let next = used();
        let settled = begun.elapsed() > Duration::from_secs(30) && next >= last * 0.9;
        last = next;
        if settled || begun.elapsed() > Duration::from_secs(120) {
            break;
        }
    }
    costs.figures.put("10,000 idle partitions, % of a core", last);
    costs.figures.put("10,000 idle partitions MiB", weir.pids().map(resident_mib).fold(0.0, f64::max));
    Ok(())
}

/// From a broker's start with ten gibibytes until it can be published to.
fn restart(program: &Path, costs: &mut Costs) -> anyhow::Result<()> {
    let data = tempfile::tempdir()?;
    let start = || start_in(Some(data.path()), program, 1, &[], topic("kept", 6, 1, ""));
    let weir = start()?;
    weir.produce("kept", 1_024, (KEPT_BYTES / 1_090.0) as u64, &[])?;
    drop(weir); // which kills it
    costs.figures.put("start with 10 GiB ms", start()?.came_up.as_secs_f64() * 1e3);
    Ok(())
}
