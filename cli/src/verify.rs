//! `weir bench verify`: publishes numbered records while people break what they like, reads everything back, and says whether
//! anything acknowledged is missing, twice there, or out of order, and how long publishing paused.

use crate::Output;
use clap::Args;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use weir_client::consumer::{From, read_partition};
use weir_client::producer::{Options, Producer};
use weir_client::{Client, Record};

/// Pauses shorter than this are not listed.
const PAUSE_MIN: Duration = Duration::from_millis(200);

#[derive(Args, Clone)]
pub(crate) struct Verify {
    /// The topic.
    #[arg(long)]
    topic: String,
    /// How long to publish, seconds.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Keys, each published to in order, one record in flight for each.
    #[arg(long, default_value_t = 12)]
    keys: u32,
    /// Records a second in all.
    #[arg(long, default_value_t = 1_000)]
    rate: u32,
    /// Bytes of a record's value.
    #[arg(long, default_value_t = 1_024)]
    size: usize,
}

#[derive(Default)]
struct Seen {
    /// (key, number) → (partition, offset)
    acknowledged: HashMap<(u32, u64), (u32, u64)>,
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

#[derive(Default)]
struct Verdict {
    stored: u64,
    lost: u64,
    twice: u64,
    out_of_order: u64,
}

/// Fails where a promise was broken.
pub(crate) async fn run(client: &Client, args: Verify, output: Output) -> anyhow::Result<()> {
    let run = uuid::Uuid::new_v4().simple().to_string();
    let seen = publish(client, &args, &run).await?;
    let partitions = client.connect(Duration::from_secs(30)).await?;
    let partitions = partitions.topic(&args.topic).map_or(0, |t| t.partitions.len() as u32);
    let verdict = read_back(client, &args.topic, partitions, &run, &seen).await?;
    let longest = seen.longest.as_millis() as u64;
    let Verdict { stored, lost, twice, out_of_order } = verdict;
    if output == Output::Json {
        let pause =
            |p: &Pause| serde_json::json!({"at_ms": p.at.as_millis() as u64, "ms": p.length.as_millis() as u64});
        println!(
            "{}",
            serde_json::json!({"acknowledged": seen.acknowledged.len(), "stored": stored, "failed": seen.failed,
                "lost": lost, "twice": twice, "out_of_order": out_of_order, "longest_pause_ms": longest,
                "pauses": seen.pauses.iter().map(pause).collect::<Vec<_>>()})
        );
    } else {
        println!(
            "{} acknowledged, {stored} stored, {} failed; {lost} lost, {twice} twice, {out_of_order} out of order; longest pause {longest} ms",
            seen.acknowledged.len(),
            seen.failed
        );
    }
    anyhow::ensure!(lost + twice + out_of_order == 0, "a promise was broken");
    Ok(())
}

async fn publish(client: &Client, args: &Verify, run: &str) -> anyhow::Result<Seen> {
    let producer =
        Producer::open(client, &args.topic, Options { linger: Duration::ZERO, ..Default::default() }).await?;
    let seen = Arc::new(Mutex::new(Seen::default()));
    let begun = Instant::now();
    let each = Duration::from_secs_f64(f64::from(args.keys) / f64::from(args.rate.max(1)));
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
                let outcome = producer.send(record).await?.await;
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                let length = asked.elapsed();
                seen.longest = seen.longest.max(length);
                if length >= PAUSE_MIN {
                    seen.pauses.push(Pause { at: begun.elapsed(), length });
                }
                match outcome {
                    Ok(Ok(at)) => drop(seen.acknowledged.insert((key, number), (at.partition, at.offset))),
                    _ => seen.failed += 1,
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

async fn read_back(client: &Client, topic: &str, partitions: u32, run: &str, seen: &Seen) -> anyhow::Result<Verdict> {
    let mut verdict = Verdict::default();
    let mut found: HashMap<(u32, u64), (u32, u64)> = HashMap::new();
    for partition in 0..partitions {
        let (sender, mut receiver) = mpsc::channel(16);
        tokio::spawn(read_partition(client.clone(), topic.to_owned(), partition, From::Earliest, true, sender));
        let mut newest: HashMap<u32, u64> = HashMap::new();
        while let Some(messages) = receiver.recv().await {
            for message in messages? {
                let value = message.record.value.unwrap_or_default();
                let Some((key, number)) = parse(&value, run) else { continue };
                verdict.stored += 1;
                let place = (partition, message.offset);
                verdict.twice += u64::from(found.insert((key, number), place).is_some());
                verdict.out_of_order += u64::from(newest.insert(key, number).is_some_and(|before| before >= number));
            }
        }
    }
    verdict.lost = seen.acknowledged.iter().filter(|(name, place)| found.get(name) != Some(place)).count() as u64;
    Ok(verdict)
}

fn parse(value: &[u8], run: &str) -> Option<(u32, u64)> {
    let mut words = std::str::from_utf8(value).ok()?.split(' ');
    (words.next()? == run).then_some(())?;
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}
