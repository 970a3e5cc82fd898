//! `weir bench`: throughput and latency, with HDR histograms.

use crate::data::now_ms;
use crate::{Output, args};
use anyhow::Context as _;
use bytes::Bytes;
use clap::{Args, Subcommand, ValueEnum};
use futures::FutureExt as _;
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use weir_broker::outln;
use weir_client::consumer::{From, read_partition};
use weir_client::producer::{Options, Position, Producer, Receipt};
use weir_client::subscriber::{self, Subscriber};
use weir_client::{Client, Compression, Record};

#[derive(Subcommand)]
#[command(after_help = "Examples:
  weir bench produce --topic load --records 10000000 --size 100
  weir bench consume --topic load --records 10000000
  weir bench latency --topic load --records 10000
  weir bench share --subscription work --members 100 --records 1000000
  weir bench verify --topic load --seconds 60         # and break something meanwhile")]
pub(crate) enum Bench {
    /// Publishes as fast as it can, or at --rate.
    Produce(Load),
    /// Reads a topic from its beginning.
    Consume(Reading),
    /// One message in flight at a time; with --rate, counted from when each was due.
    Latency(Single),
    /// Works off what a subscription has before it: many members, each message acknowledged by itself.
    Share(Share),
    /// Publishes numbered records for a while, then reads back whether any acknowledged one is missing, twice there or out of order.
    Verify(crate::verify::Verify),
}

#[derive(Args, Clone)]
pub(crate) struct Load {
    /// The topic.
    #[arg(long, value_parser = args::name)]
    topic: String,
    /// Records in all.
    #[arg(long, default_value_t = 1_000_000, value_parser = args::count, allow_hyphen_values = true)]
    records: u64,
    /// Bytes of a record's value.
    #[arg(long, default_value_t = 100, value_parser = args::size, allow_hyphen_values = true)]
    size: usize,
    /// Records a second in all; 0 for as many as possible. Latency is then counted from when a record was due.
    #[arg(long, default_value_t = 0, value_parser = args::number::<u64>(0..=1_000_000_000), allow_hyphen_values = true)]
    rate: u64,
    /// Producers, each with its own stream to each partition.
    #[arg(long, default_value_t = 1, value_parser = args::number::<u64>(1..=10_000), allow_hyphen_values = true)]
    producers: u64,
    /// How long a batch waits for more records, such as 500us or 5ms.
    #[arg(long, value_parser = args::linger, default_value = "500us", allow_hyphen_values = true)]
    linger: Duration,
    /// Compression of batches.
    #[arg(long, value_enum, default_value_t = Codec::None)]
    compression: Codec,
}

#[derive(Args, Clone)]
pub(crate) struct Reading {
    /// The topic.
    #[arg(long, value_parser = args::name)]
    topic: String,
    /// Records to read.
    #[arg(long, default_value_t = 1_000_000, value_parser = args::count, allow_hyphen_values = true)]
    records: u64,
}

#[derive(Args, Clone)]
pub(crate) struct Single {
    /// The topic.
    #[arg(long, value_parser = args::name)]
    topic: String,
    /// Records in all.
    #[arg(long, default_value_t = 10_000, value_parser = args::count, allow_hyphen_values = true)]
    records: u64,
    /// Bytes of a record's value.
    #[arg(long, default_value_t = 100, value_parser = args::size, allow_hyphen_values = true)]
    size: usize,
    /// Records a second; 0 for one as soon as the last is answered.
    #[arg(long, default_value_t = 0, value_parser = args::number::<u64>(0..=1_000_000_000), allow_hyphen_values = true)]
    rate: u64,
    /// What a record's time ends with.
    #[arg(long, value_enum, default_value_t = Until::Acked)]
    until: Until,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Until {
    /// The publisher knows that it is stored.
    Acked,
    /// A reader of the topic has it.
    Read,
}

#[derive(Args, Clone)]
pub(crate) struct Share {
    /// The subscription, of mode shared or keyShared; its backlog is what is worked off.
    #[arg(long, value_parser = args::name)]
    subscription: String,
    /// Members.
    #[arg(long, default_value_t = 100, value_parser = args::number::<u32>(1..=100_000), allow_hyphen_values = true)]
    members: u32,
    /// Messages in all.
    #[arg(long, default_value_t = 1_000_000, value_parser = args::count, allow_hyphen_values = true)]
    records: u64,
    /// Messages a member has at one time, of each partition.
    #[arg(long, default_value_t = 200, value_parser = args::number::<u32>(1..=1_000_000), allow_hyphen_values = true)]
    credit: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Codec {
    None,
    Gzip,
    Snappy,
    Lz4,
    Zstd,
}

impl std::convert::From<Codec> for Compression {
    fn from(codec: Codec) -> Self {
        match codec {
            Codec::None => Self::None,
            Codec::Gzip => Self::Gzip,
            Codec::Snappy => Self::Snappy,
            Codec::Lz4 => Self::Lz4,
            Codec::Zstd => Self::Zstd,
        }
    }
}

/// Receipts of as many records are handed on together, where they come as fast as they can.
const CHUNK: usize = 256;
/// As fast as they can, the clock is read for so many records at once, which then are about 10 µs apart.
const CLOCK_EVERY: u64 = 16;

struct Outcome {
    records: u64,
    bytes: u64,
    seconds: f64,
    latency_us: Histogram<u64>,
    /// offsets between those acknowledged that were not; more than those of others who published meanwhile were stored twice
    gaps: Option<u64>,
}

/// Processor time this process has used; 0 where the system does not say.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // behind the name, which may hold anything: the state, ten numbers, then user and system time in hundredths of a second
    let behind = stat.rsplit_once(')').map_or("", |(_, behind)| behind);
    behind.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<f64>().ok()).sum::<f64>() / 100.0
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 600_000_000, 3).expect("right bounds")
}

fn bar(records: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {per_sec} {eta}").expect("a right template");
    ProgressBar::new(records).with_style(style) // draws on standard error, and only on a terminal
}

pub(crate) async fn run(client: &Client, bench: Bench, output: Output) -> anyhow::Result<()> {
    let outcome = match bench {
        Bench::Produce(load) => produce(client, &load).await?,
        Bench::Consume(load) => consume(client, &load).await?,
        Bench::Latency(load) => latency(client, &load).await?,
        Bench::Share(work) => share(client, &work).await?,
        Bench::Verify(verify) => return crate::verify::run(client, verify, output).await,
    };
    let Outcome { records, bytes, seconds, latency_us: l, gaps } = outcome;
    let (rate, megabytes) = (records as f64 / seconds, bytes as f64 / 1e6 / seconds);
    let (p50, p99, p999, max) =
        (l.value_at_quantile(0.5), l.value_at_quantile(0.99), l.value_at_quantile(0.999), l.max());
    if output == Output::Json {
        let latency = serde_json::json!({"p50": p50, "p99": p99, "p999": p999, "max": max});
        outln!(
            "{}",
            serde_json::json!({"records": records, "bytes": bytes, "seconds": seconds,
            "records_per_second": rate, "megabytes_per_second": megabytes, "latency_us": latency, "gaps": gaps,
            "cpu_seconds": cpu_seconds()})
        )?;
        return Ok(());
    }
    outln!("{records} records, {bytes} bytes in {seconds:.2} s: {rate:.0} records/s, {megabytes:.1} MB/s")?;
    if !l.is_empty() {
        outln!("latency: p50 {p50} µs, p99 {p99} µs, p99.9 {p999} µs, max {max} µs")?;
    }
    Ok(())
}

async fn produce(client: &Client, load: &Load) -> anyhow::Result<Outcome> {
    let progress = bar(load.records);
    let started = Instant::now();
    let latencies = Arc::new(Mutex::new(histogram()));
    let mut tasks = Vec::new();
    for at in 0..load.producers.max(1) {
        let share = load.records / load.producers + u64::from(at < load.records % load.producers);
        let options = Options { linger: load.linger, compression: load.compression.into(), ..Default::default() };
        let producer = Producer::open(client, &load.topic, options).await?;
        tasks.push(tokio::spawn(produce_share(producer, load.clone(), share, latencies.clone(), progress.clone())));
    }
    let mut stored = Stored::default();
    for task in tasks {
        stored.add(task.await??);
    }
    let seconds = started.elapsed().as_secs_f64();
    progress.finish_and_clear();
    let latency_us = latencies.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let bytes = load.records.saturating_mul(load.size as u64);
    Ok(Outcome { records: load.records, bytes, seconds, latency_us, gaps: Some(stored.gaps()) })
}

/// Of each partition the first and last offset acknowledged, and how many were.
#[derive(Default)]
struct Stored(BTreeMap<u32, (u64, u64, u64)>);

impl Stored {
    fn add(&mut self, other: Self) {
        for (partition, (first, last, count)) in other.0 {
            self.put(partition, first, last, count);
        }
    }

    fn put(&mut self, partition: u32, first: u64, last: u64, count: u64) {
        let of = self.0.entry(partition).or_insert((first, last, 0));
        *of = (of.0.min(first), of.1.max(last), of.2 + count);
    }

    fn gaps(&self) -> u64 {
        self.0.values().map(|(first, last, count)| (last - first + 1).abs_diff(*count)).sum()
    }
}

async fn produce_share(
    producer: Producer,
    load: Load,
    share: u64,
    latencies: Arc<Mutex<Histogram<u64>>>,
    progress: ProgressBar,
) -> anyhow::Result<Stored> {
    let value = Bytes::from(vec![b'x'; load.size]);
    let (sent, mut waiting) = mpsc::channel::<Vec<(Instant, Receipt)>>(100_000 / CHUNK);
    let receiving = tokio::spawn(async move {
        let mut local = histogram();
        let mut stored = Stored::default();
        let mut count = 0u64;
        while let Some(chunk) = waiting.recv().await {
            let mut now = Instant::now();
            for (due, mut receipt) in chunk {
                let Position { partition, offset } = match (&mut receipt).now_or_never() {
                    Some(stored) => stored?,
                    None => {
                        let stored = receipt.await?;
                        now = Instant::now();
                        stored
                    }
                };
                stored.put(partition, offset, offset, 1);
                local.saturating_record((now.duration_since(due).as_micros() as u64).max(1));
                count += 1;
                if count.is_multiple_of(4_096) {
                    progress.inc(4_096);
                }
            }
        }
        latencies.lock().unwrap_or_else(PoisonError::into_inner).add(local).context("adding histograms")?;
        Ok(stored)
    });
    let interval =
        if load.rate == 0 { Duration::ZERO } else { Duration::from_secs_f64(load.producers as f64 / load.rate as f64) };
    let (started, started_ms) = (Instant::now(), now_ms());
    // at a rate each is waited for from the beginning
    let chunk_records = if load.rate > 0 { 1 } else { CHUNK };
    let mut chunk = Vec::with_capacity(chunk_records);
    let mut now = started;
    for at in 0..share {
        // counted from when it was due: a stall is charged to all that it delayed
        if load.rate > 0 || at.is_multiple_of(CLOCK_EVERY) {
            now = Instant::now();
        }
        let due = if load.rate == 0 { now } else { started + interval.mul_f64(at as f64) };
        if due > now {
            tokio::time::sleep_until(due.into()).await;
        }
        let timestamp_ms = started_ms + due.duration_since(started).as_millis() as i64;
        let record = Record { value: Some(value.clone()), timestamp_ms, ..Default::default() };
        chunk.push((due, producer.send(record).await?));
        if (chunk.len() == chunk_records || at + 1 == share)
            && sent.send(std::mem::replace(&mut chunk, Vec::with_capacity(chunk_records))).await.is_err()
        {
            break;
        }
    }
    drop(sent);
    receiving.await?
}

async fn consume(client: &Client, load: &Reading) -> anyhow::Result<Outcome> {
    let progress = bar(load.records);
    let cluster = client.cluster();
    let topic = cluster.topic(&load.topic).with_context(|| format!("topic {} does not exist", load.topic))?;
    let (sender, mut receiver) = mpsc::channel(64);
    let started = Instant::now();
    for partition in 0..topic.partitions.len() as u32 {
        tokio::spawn(read_partition(
            client.clone(),
            load.topic.clone(),
            partition,
            From::Earliest,
            true,
            sender.clone(),
        ));
    }
    drop(sender);
    let (mut records, mut bytes) = (0, 0);
    while records < load.records {
        let Some(messages) = receiver.recv().await else { break };
        let messages = messages?;
        records += messages.len() as u64;
        bytes += messages.iter().map(|m| m.record.value.as_ref().map_or(0, Bytes::len) as u64).sum::<u64>();
        progress.set_position(records);
    }
    progress.finish_and_clear();
    anyhow::ensure!(records >= load.records, "the topic holds {records} records, {} were asked for", load.records);
    Ok(Outcome { records, bytes, seconds: started.elapsed().as_secs_f64(), latency_us: histogram(), gaps: None })
}

async fn share(client: &Client, work: &Share) -> anyhow::Result<Outcome> {
    let progress = bar(work.records);
    // from the first member's opening until all have said their last ack
    let started = Instant::now();
    let mut members = Vec::new();
    for at in 0..work.members {
        let options = subscriber::Options { member: format!("member-{at}"), credit: work.credit, ..Default::default() };
        members.push(Subscriber::open(client, &work.subscription, options).await?);
    }
    let (done, bytes) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let all = tokio::sync::watch::Sender::new(false);
    let mut tasks = tokio::task::JoinSet::new();
    for mut member in members {
        let (done, bytes, progress, records) = (done.clone(), bytes.clone(), progress.clone(), work.records);
        let (all, mut over) = (all.clone(), all.subscribe());
        tasks.spawn(async move {
            loop {
                let next = tokio::select! {
                    next = member.next() => next,
                    _ = over.wait_for(|over| *over) => break,
                };
                let delivered = next.context("the subscription ended")??;
                let size = delivered.message.record.value.as_ref().map_or(0, Bytes::len);
                bytes.fetch_add(size as u64, Ordering::Relaxed);
                delivered.ack();
                let before = done.fetch_add(1, Ordering::Relaxed);
                if before.is_multiple_of(4_096) {
                    progress.inc(4_096);
                }
                if before + 1 >= records {
                    all.send_replace(true);
                    break;
                }
            }
            member.close().await;
            anyhow::Ok(())
        });
    }
    while let Some(task) = tasks.join_next().await {
        task??;
    }
    let seconds = started.elapsed().as_secs_f64();
    progress.finish_and_clear();
    let (records, bytes) = (done.load(Ordering::Relaxed), bytes.load(Ordering::Relaxed));
    Ok(Outcome { records, bytes, seconds, latency_us: histogram(), gaps: None })
}

async fn latency(client: &Client, load: &Single) -> anyhow::Result<Outcome> {
    let options = Options { linger: Duration::ZERO, ..Default::default() };
    let producer = Producer::open(client, &load.topic, options).await?;
    let mut reader = match load.until {
        Until::Acked => None,
        Until::Read => {
            let (sender, receiver) = mpsc::channel(64);
            let (client, topic) = (client.clone(), load.topic.clone());
            tokio::spawn(read_partition(client, topic, 0, From::Latest, false, sender));
            // it reads on from where the topic ended when it began
            tokio::time::sleep(Duration::from_millis(500)).await;
            Some(receiver)
        }
    };
    let value = Bytes::from(vec![b'x'; load.size]);
    let record = || Record { value: Some(value.clone()), timestamp_ms: now_ms(), ..Default::default() };
    let mut single = async || {
        let stored = producer.send_to(0, record()).await?;
        let Some(reader) = &mut reader else { return Ok(stored.await?) };
        let read = reader.recv().await.context("the reader ended")??;
        let at = stored.await?;
        anyhow::ensure!(read.iter().any(|m| m.offset == at.offset), "somebody else publishes to the topic");
        Ok(at)
    };
    single().await?;
    let mut latency_us = histogram();
    let progress = bar(load.records);
    let started = Instant::now();
    for at in 0..load.records {
        let due = if load.rate == 0 {
            Instant::now()
        } else {
            started + Duration::from_secs_f64(at as f64 / load.rate as f64)
        };
        if due > Instant::now() {
            tokio::time::sleep_until(due.into()).await;
        }
        single().await?;
        latency_us.saturating_record((due.elapsed().as_micros() as u64).max(1));
        progress.inc(1);
    }
    progress.finish_and_clear();
    Ok(Outcome {
        records: load.records,
        bytes: load.records.saturating_mul(load.size as u64),
        seconds: started.elapsed().as_secs_f64(),
        latency_us,
        gaps: None,
    })
}
