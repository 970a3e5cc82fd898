//! `weir bench verify`: publishes numbered records while people break what they like, reads everything back, and says whether
//! anything acknowledged is missing, twice there, or out of order, and how long publishing paused.

use crate::{Output, args};
use clap::Args;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use weir_broker::outln;
use weir_checker::{Event, History, Log, Place};
use weir_client::consumer::{From, read_partition};
use weir_client::producer::{Options, Producer};
use weir_client::{Client, Record};

/// Pauses shorter than this are not listed.
const PAUSE_MIN: Duration = Duration::from_millis(200);

#[derive(Args, Clone)]
pub(crate) struct Verify {
    /// The topic.
    #[arg(long, value_parser = args::name)]
    topic: String,
    /// How long to publish, seconds.
    #[arg(long, default_value_t = 60, value_parser = args::count, allow_hyphen_values = true)]
    seconds: u64,
    /// Keys, each published to in order, one record in flight for each.
    #[arg(long, default_value_t = 12, value_parser = args::number::<u32>(1..=100_000), allow_hyphen_values = true)]
    keys: u32,
    /// Records a second in all.
    #[arg(long, default_value_t = 1_000, value_parser = args::number::<u32>(1..=1_000_000), allow_hyphen_values = true)]
    rate: u32,
    /// Bytes of a record's value.
    #[arg(long, default_value_t = 1_024, value_parser = args::size, allow_hyphen_values = true)]
    size: usize,
}

#[derive(Default)]
struct Seen {
    /// records are (key, number)
    history: History<(u32, u64)>,
    /// no ack within the producer's deadline: they may be stored or not
    failed: u64,
    longest: Duration,
    pauses: Vec<Pause>,
}

#[derive(Clone, Copy)]
struct Pause {
    at: Duration,
    length: Duration,
}

/// Fails where a promise was broken.
pub(crate) async fn run(client: &Client, args: Verify, output: Output) -> anyhow::Result<()> {
    let run = uuid::Uuid::new_v4().simple().to_string();
    let seen = publish(client, &args, &run).await?;
    let partitions = client.connect(Duration::from_secs(30)).await?;
    let partitions = partitions.topic(&args.topic).map_or(0, |t| t.partitions.len() as u32);
    let logs = read_back(client, &args.topic, partitions, &run).await?;
    let stored: usize = logs.iter().map(|l| l.records.len()).sum();
    let acknowledged = seen.history.acknowledged();
    let report = seen.history.check(&logs);
    let (lost, twice, out_of_order) = (report.count("lost"), report.count("duplicated"), report.count("reordered"));
    let longest = seen.longest.as_millis() as u64;
    if output == Output::Json {
        let pause =
            |p: &Pause| serde_json::json!({"at_ms": p.at.as_millis() as u64, "ms": p.length.as_millis() as u64});
        outln!(
            "{}",
            serde_json::json!({"acknowledged": acknowledged, "stored": stored, "failed": seen.failed,
                "lost": lost, "twice": twice, "out_of_order": out_of_order, "longest_pause_ms": longest,
                "pauses": seen.pauses.iter().map(pause).collect::<Vec<_>>()})
        )?;
    } else {
        outln!(
            "{acknowledged} acknowledged, {stored} stored, {} failed; {lost} lost, {twice} twice, {out_of_order} out of order; longest pause {longest} ms",
            seen.failed
        )?;
    }
    anyhow::ensure!(report.0.is_empty(), "a promise was broken: {report}");
    Ok(())
}

async fn publish(client: &Client, args: &Verify, run: &str) -> anyhow::Result<Seen> {
    let producer =
        Producer::open(client, &args.topic, Options { linger: Duration::ZERO, ..Default::default() }).await?;
    let seen = Arc::new(Mutex::new(Seen::default()));
    let begun = Instant::now();
    let each = Duration::from_secs_f64(f64::from(args.keys) / f64::from(args.rate));
    let mut tasks = Vec::new();
    for key in 0..args.keys {
        let (producer, seen, run, args) = (producer.clone(), seen.clone(), run.to_owned(), args.clone());
        tasks.push(tokio::spawn(async move {
            let mut due = tokio::time::interval(each);
            due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            for number in 0.. {
                due.tick().await;
                if begun.elapsed() >= Duration::from_secs(args.seconds) {
                    return Ok(());
                }
                let mut value = format!("{run} {key} {number} ").into_bytes();
                value.resize(value.len().max(args.size), b'.');
                let record =
                    Record { key: Some(format!("k{key}").into()), value: Some(value.into()), ..Default::default() };
                let asked = Instant::now();
                let offered = Event::Offered { producer: key.into(), value: (key, number) };
                seen.lock().unwrap_or_else(PoisonError::into_inner).history.push(offered);
                let outcome = producer.send(record).await?.await;
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                let length = asked.elapsed();
                seen.longest = seen.longest.max(length);
                if length >= PAUSE_MIN {
                    seen.pauses.push(Pause { at: begun.elapsed(), length });
                }
                match outcome {
                    Ok(at) => {
                        let at = Place { partition: at.partition, offset: at.offset };
                        seen.history.push(Event::Acked { value: (key, number), at });
                    }
                    Err(_) => seen.failed += 1,
                }
            }
            anyhow::Ok(())
        }));
    }
    for task in tasks {
        task.await??;
    }
    Ok(std::mem::take(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner)))
}

/// The records of this run, partition by partition.
async fn read_back(client: &Client, topic: &str, partitions: u32, run: &str) -> anyhow::Result<Vec<Log<(u32, u64)>>> {
    let mut logs = Vec::new();
    for partition in 0..partitions {
        let (sender, mut receiver) = mpsc::channel(16);
        tokio::spawn(read_partition(client.clone(), topic.to_owned(), partition, From::Earliest, true, sender));
        let mut log = Log { of: "reader".to_owned(), partition, start: 0, records: Vec::new() };
        while let Some(messages) = receiver.recv().await {
            for message in messages? {
                let value = message.record.value.unwrap_or_default();
                log.records.extend(parse(&value, run).map(|name| (message.offset, name)));
            }
        }
        logs.push(log);
    }
    Ok(logs)
}

fn parse(value: &[u8], run: &str) -> Option<(u32, u64)> {
    let mut words = std::str::from_utf8(value).ok()?.split(' ');
    (words.next()? == run).then_some(())?;
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}
