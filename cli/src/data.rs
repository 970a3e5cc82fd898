//! `weir publish` and `weir consume`.

use crate::Output;
use anyhow::Context as _;
use bytes::Bytes;
use clap::Args;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::sync::mpsc;
use weir_client::consumer::{self, From, Message};
use weir_client::producer::{Options, Producer};
use weir_client::schedule::{Scheduled, schedule};
use weir_client::subscriber::Subscriber;
use weir_client::{Client, Record};

#[derive(Args)]
#[command(after_help = "Examples:
  echo hello | weir publish orders --key alice --header kind=greeting
  weir publish pictures --file cat.png
  echo 'call back' | weir publish reminders --delay 1h30m -o json")]
pub(crate) struct Publish {
    /// The topic.
    topic: String,
    /// Key of every message; one key's messages keep their order.
    #[arg(long)]
    key: Option<String>,
    /// A header, name=value; may be repeated.
    #[arg(long)]
    header: Vec<String>,
    /// Publish this file as one message, not standard input's lines.
    #[arg(long)]
    file: Option<PathBuf>,
    /// Have it published later: after this long, such as 90s or 7d. `-o json` prints what `weir topic unschedule` takes.
    #[arg(long, value_parser = humantime::parse_duration)]
    delay: Option<Duration>,
}

/// ms since the epoch.
pub(crate) fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64)
}

pub(crate) async fn publish(client: &Client, args: Publish, output: Output) -> anyhow::Result<()> {
    let header = |h: &String| {
        let (name, value) = h.split_once('=').with_context(|| format!("--header: '{h}' is not name=value"))?;
        anyhow::Ok((name.to_owned(), Bytes::from(value.to_owned())))
    };
    let headers = args.header.iter().map(header).collect::<anyhow::Result<Vec<_>>>()?;
    let record = |value: Bytes| Record {
        key: args.key.clone().map(Bytes::from),
        value: Some(value),
        headers: headers.clone(),
        timestamp_ms: now_ms(),
    };
    if let Some(delay) = args.delay {
        return publish_later(client, &args, record, SystemTime::now() + delay, output).await;
    }
    let producer = Producer::open(client, &args.topic, Options::default()).await?;
    let (outcomes, mut waiting) = mpsc::channel(10_000);
    let sending = async {
        match &args.file {
            Some(file) => {
                let value = std::fs::read(file).with_context(|| file.display().to_string())?;
                outcomes.send(producer.send(record(value.into())).await?).await?;
            }
            None => {
                let mut lines = BufReader::new(tokio::io::stdin()).lines();
                while let Some(line) = lines.next_line().await? {
                    outcomes.send(producer.send(record(line.into())).await?).await?;
                }
            }
        }
        drop(outcomes);
        anyhow::Ok(())
    };
    let receiving = async {
        let mut count = 0u64;
        while let Some(outcome) = waiting.recv().await {
            let position = outcome.await?;
            count += 1;
            if output == Output::Json {
                println!("{}", serde_json::json!({"partition": position.partition, "offset": position.offset}));
            }
        }
        anyhow::Ok(count)
    };
    let (sent, count) = tokio::join!(sending, receiving);
    let count = count?;
    sent?;
    if output == Output::Text {
        eprintln!("{count} messages published to {}", args.topic);
    }
    Ok(())
}

/// Lines scheduled in one call.
const LATER_MAX: usize = 1_000;

async fn publish_later(
    client: &Client,
    args: &Publish,
    record: impl Fn(Bytes) -> Record,
    at: SystemTime,
    output: Output,
) -> anyhow::Result<()> {
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let mut count = 0;
    loop {
        let mut list = Vec::new();
        if let Some(file) = &args.file {
            let value = std::fs::read(file).with_context(|| file.display().to_string())?;
            list.push((record(value.into()), at));
        } else {
            while list.len() < LATER_MAX
                && let Some(line) = lines.next_line().await?
            {
                list.push((record(line.into()), at));
            }
        }
        if list.is_empty() {
            break;
        }
        for Scheduled { partition, offset, .. } in schedule(client, &args.topic, list).await? {
            count += 1;
            if output == Output::Json {
                println!("{}", serde_json::json!({"partition": partition, "offset": offset, "scheduled": true}));
            }
        }
        if args.file.is_some() {
            break;
        }
    }
    if output == Output::Text {
        eprintln!("{count} messages scheduled for {}", args.topic);
    }
    Ok(())
}

#[derive(Args)]
#[command(after_help = "Examples:
  weir consume --topic orders --from earliest
  weir consume --subscription mail --max 10 -o json
FROM is earliest, latest, an offset, or a time such as 2026-01-31T08:00:00Z, or one as ms since the epoch (from 1000000000000 on).")]
pub(crate) struct Consume {
    /// Read as this subscription, and acknowledge what was printed.
    #[arg(long, conflicts_with = "topic", required_unless_present = "topic")]
    subscription: Option<String>,
    /// Read this topic, leaving no trace.
    #[arg(long)]
    topic: Option<String>,
    /// Where to start, with --topic.
    #[arg(long, default_value = "latest", value_parser = parse_from)]
    from: From,
    /// Stop after so many messages.
    #[arg(long)]
    max: Option<u64>,
}

pub(crate) fn parse_from(text: &str) -> Result<From, String> {
    match (text, text.parse::<u64>()) {
        ("earliest", _) => Ok(From::Earliest),
        ("latest", _) => Ok(From::Latest),
        (_, Ok(n)) if n >= 1_000_000_000_000 => Ok(From::Time(n)),
        (_, Ok(n)) => Ok(From::Offset(n)),
        _ => match humantime::parse_rfc3339(text).map(|t| t.duration_since(std::time::UNIX_EPOCH)) {
            Ok(Ok(time)) => Ok(From::Time(time.as_millis() as u64)),
            _ => Err("not earliest, latest, an offset, a time such as 2026-01-31T08:00:00Z, or one in ms".to_owned()),
        },
    }
}

fn print(message: &Message, output: Output) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    let text = |b: &Option<Bytes>| b.as_ref().map(|b| String::from_utf8_lossy(b).into_owned());
    let record = &message.record;
    match output {
        Output::Raw => {
            out.write_all(record.value.as_deref().unwrap_or_default())?;
            out.write_all(b"\n")
        }
        Output::Json => {
            let headers: serde_json::Map<_, _> =
                record.headers.iter().map(|(n, v)| (n.clone(), String::from_utf8_lossy(v).into())).collect();
            let line = serde_json::json!({"topic": &*message.topic, "partition": message.partition, "offset": message.offset, "key": text(&record.key),
                "value": text(&record.value), "headers": headers, "timestampMs": record.timestamp_ms});
            writeln!(out, "{line}")
        }
        Output::Text => {
            let key = text(&record.key).map_or(String::new(), |k| format!("{k}: "));
            writeln!(out, "{}/{} {key}{}", message.partition, message.offset, text(&record.value).unwrap_or_default())
        }
    }
}

pub(crate) async fn consume(client: &Client, args: Consume, output: Output) -> anyhow::Result<()> {
    let mut left = args.max.unwrap_or(u64::MAX);
    if let Some(subscription) = &args.subscription {
        return consume_subscription(client, subscription, left, output).await;
    }
    let topic = args.topic.expect("clap requires one");
    let cluster = client.cluster();
    let count = cluster.topic(&topic).with_context(|| format!("topic {topic} does not exist"))?.partitions.len();
    let (sender, mut receiver) = mpsc::channel(16);
    for partition in 0..count as u32 {
        tokio::spawn(consumer::read_partition(
            client.clone(),
            topic.clone(),
            partition,
            args.from,
            false,
            sender.clone(),
        ));
    }
    drop(sender);
    while let Some(messages) = receiver.recv().await {
        for message in messages? {
            if left == 0 {
                return Ok(());
            }
            print(&message, output)?;
            left -= 1;
        }
        if left == 0 {
            return Ok(());
        }
    }
    Ok(())
}

async fn consume_subscription(client: &Client, name: &str, max: u64, output: Output) -> anyhow::Result<()> {
    let mut subscriber = Subscriber::open(client, name, Default::default()).await?;
    for _ in 0..max {
        let Some(next) = subscriber.next().await else { break };
        let delivered = next?;
        print(&delivered.message, output)?;
        delivered.ack();
    }
    subscriber.close().await;
    Ok(())
}
