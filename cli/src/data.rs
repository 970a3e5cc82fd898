//! `weir publish` and `weir consume`.

use crate::Output;
use crate::args::{self, MESSAGE_BYTES_MAX};
use anyhow::Context as _;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use clap::Args;
use serde_json::Value;
use std::ffi::OsString;
use std::io::Read as _;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use weir_broker::outln;
use weir_broker::output::{self, Unwritten};
use weir_client::consumer::{self, From, Message, PassedOver, Read};
use weir_client::producer::{Options, Producer};
use weir_client::schedule::{Scheduled, schedule};
use weir_client::subscriber::{self, Subscriber};
use weir_client::{Client, Record};

/// Time that a consumer which is stopped while it opens partitions waits for them, to leave them as planned. A second signal ends the wait.
const OPENS_WITHIN: Duration = Duration::from_secs(20);

#[derive(Args)]
#[command(after_help = "Examples:
  echo hello | weir publish orders --key alice --header kind=greeting
  weir publish pictures --file cat.png
  echo 'call back' | weir publish reminders --delay 1h30m -o json
Each line of standard input is one message, any bytes up to the line feed; a carriage return before it belongs to the message.")]
pub(crate) struct Publish {
    /// The topic.
    #[arg(value_parser = args::name)]
    topic: String,
    /// Key of every message; one key's messages keep their order.
    #[arg(long)]
    key: Option<OsString>,
    /// A header, name=value; may be repeated.
    #[arg(long)]
    header: Vec<OsString>,
    /// Publish this file as one message, not standard input's lines.
    #[arg(long)]
    file: Option<PathBuf>,
    /// Have it published later: after this long, such as 90s or 7d, at most 3650d. `-o json` prints the arguments of
    /// `weir topic unschedule`.
    #[arg(long, value_parser = args::delay, allow_hyphen_values = true)]
    delay: Option<Duration>,
}

/// ms since the epoch.
pub(crate) fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64)
}

/// What is published: the bytes of a file, or standard input's lines.
enum Input {
    File(Option<Bytes>),
    Lines(BufReader<tokio::io::Stdin>),
}

impl Input {
    fn open(file: Option<&Path>) -> anyhow::Result<Self> {
        let Some(file) = file else { return Ok(Self::Lines(BufReader::new(tokio::io::stdin()))) };
        let mut bytes = Vec::new();
        let read = std::fs::File::open(file).and_then(|f| f.take(MESSAGE_BYTES_MAX + 1).read_to_end(&mut bytes));
        read.with_context(|| file.display().to_string())?;
        let fits = bytes.len() as u64 <= MESSAGE_BYTES_MAX;
        anyhow::ensure!(fits, "{} is larger than 32 MiB, more than any topic takes in one message", file.display());
        Ok(Self::File(Some(bytes.into())))
    }

    /// The next message; `number` counts lines, for errors.
    async fn next(&mut self, number: u64) -> anyhow::Result<Option<Bytes>> {
        let lines = match self {
            Self::File(bytes) => return Ok(bytes.take()),
            Self::Lines(lines) => lines,
        };
        let mut line = Vec::new();
        let read = lines.take(MESSAGE_BYTES_MAX + 1).read_until(b'\n', &mut line).await;
        if read.with_context(|| format!("line {number} of standard input"))? == 0 {
            return Ok(None);
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        let fits = line.len() as u64 <= MESSAGE_BYTES_MAX;
        anyhow::ensure!(
            fits,
            "line {number} of standard input is larger than 32 MiB, more than any topic takes in one message"
        );
        Ok(Some(line.into()))
    }
}

pub(crate) async fn publish(client: &Client, args: Publish, output: Output) -> anyhow::Result<()> {
    let headers = args.header.iter().cloned().map(args::header).collect::<anyhow::Result<Vec<_>>>()?;
    let key = args.key.clone().map(|key| Bytes::from(key.into_vec()));
    let record = |value: Bytes| Record {
        key: key.clone(),
        value: Some(value),
        headers: headers.clone(),
        timestamp_ms: now_ms(),
    };
    let mut input = Input::open(args.file.as_deref())?;
    if let Some(delay) = args.delay {
        return publish_later(client, &args.topic, input, record, SystemTime::now() + delay, output).await;
    }
    let producer = Producer::open(client, &args.topic, Options::default()).await?;
    let (outcomes, mut waiting) = mpsc::channel(10_000);
    let sending = async {
        for number in 1.. {
            let Some(value) = input.next(number).await? else { break };
            if outcomes.send((number, producer.send(record(value)).await?)).await.is_err() {
                break; // one was not published: that is what is reported
            }
        }
        drop(outcomes);
        anyhow::Ok(())
    };
    let receiving = async {
        let (mut count, mut failed, mut printed) = (0u64, None, Ok(()));
        while let Some((number, outcome)) = waiting.recv().await {
            match outcome.await {
                Ok(position) => {
                    count += 1;
                    if output == Output::Json && printed.is_ok() {
                        let place = serde_json::json!({"partition": position.partition, "offset": position.offset});
                        printed = output::line(place);
                        if printed.is_err() {
                            waiting.close(); // nothing more is sent that nobody would learn of
                        }
                    }
                }
                Err(error) => {
                    failed.get_or_insert((number, error));
                    waiting.close(); // nothing more is sent; what was sent is waited for
                }
            }
        }
        (count, failed, printed)
    };
    let (sent, (count, failed, printed)) = tokio::join!(sending, receiving);
    let others = || format!("{count} other messages were published to {}", args.topic);
    if let Some((number, error)) = failed {
        let what = if args.file.is_some() { "the file".to_owned() } else { format!("line {number}") };
        return Err(anyhow::Error::new(error).context(format!("{what} was not published; {}", others())));
    }
    sent.with_context(others)?;
    printed.with_context(|| format!("{count} messages were published to {}", args.topic))?;
    if output == Output::Text {
        output::note(format_args!("{count} messages published to {}", args.topic));
    }
    Ok(())
}

/// Messages scheduled in one call.
const LATER_MAX: usize = 1_000;
/// Bytes of lines scheduled in one call, which fit every topic's batches but the smallest; a larger line is one call.
const LATER_BYTES_MAX: usize = 256 << 10;
/// Bytes that a message takes beside its key, value and headers.
const OVERHEAD_BYTES: usize = 64;

async fn publish_later(
    client: &Client,
    topic: &str,
    mut input: Input,
    record: impl Fn(Bytes) -> Record,
    at: SystemTime,
    output: Output,
) -> anyhow::Result<()> {
    let (mut count, mut number) = (0u64, 0);
    let mut next = None;
    loop {
        let (mut list, mut bytes) = (Vec::new(), 0);
        while list.len() < LATER_MAX {
            let record = match next.take() {
                Some(record) => record,
                None => {
                    number += 1;
                    let value = input.next(number).await.with_context(|| format!("{count} messages were scheduled"))?;
                    let Some(value) = value else { break };
                    record(value)
                }
            };
            bytes += bytes_of(&record);
            if bytes > LATER_BYTES_MAX && !list.is_empty() {
                next = Some(record);
                break;
            }
            list.push((record, at));
        }
        if list.is_empty() {
            break;
        }
        let scheduled = schedule(client, topic, list).await;
        for Scheduled { partition, offset, topic_id, .. } in
            scheduled.with_context(|| format!("{count} messages were scheduled"))?
        {
            count += 1;
            if output == Output::Json {
                let place = serde_json::json!({"partition": partition, "offset": offset, "topicId": topic_id, "scheduled": true});
                output::line(place).with_context(|| format!("{count} or more messages were scheduled"))?;
            }
        }
    }
    if output == Output::Text {
        output::note(format_args!("{count} messages scheduled for {topic}"));
    }
    Ok(())
}

fn bytes_of(record: &Record) -> usize {
    let part = |bytes: &Option<Bytes>| bytes.as_ref().map_or(0, Bytes::len);
    let headers: usize = record.headers.iter().map(|(name, value)| name.len() + part(value) + OVERHEAD_BYTES).sum();
    part(&record.key) + part(&record.value) + headers + OVERHEAD_BYTES
}

#[derive(Args)]
#[command(group(clap::ArgGroup::new("source").required(true).args(["subscription", "topic"])))]
#[command(after_help = "Examples:
  weir consume --topic orders --from earliest
  weir consume --subscription mail --max 10 -o json
FROM is earliest, latest, an offset, or a time such as 2026-01-31T08:00:00Z, or one as ms since the epoch (from 1000000000000 on).
Messages whose records cannot be decoded are passed over; with --topic, standard error says which offsets they have (-o json: as JSON).")]
pub(crate) struct Consume {
    /// Read as this subscription, and acknowledge what was printed.
    #[arg(long, value_parser = args::name)]
    subscription: Option<String>,
    /// Read this topic, leaving no trace.
    #[arg(long, value_parser = args::name)]
    topic: Option<String>,
    /// Where to start, with --topic; default: latest. A subscription has its own position: `weir subscription seek`.
    #[arg(long, value_parser = args::from, conflicts_with = "subscription", allow_hyphen_values = true)]
    from: Option<From>,
    /// Stop after this many messages.
    #[arg(long, value_parser = args::count, allow_hyphen_values = true)]
    max: Option<u64>,
}

/// Bytes as JSON: text, or null and a field beside it with the bytes in base64 where they are not UTF-8.
fn put(json: &mut serde_json::Map<String, Value>, name: &str, bytes: Option<&Bytes>) {
    let text = bytes.map(|bytes| std::str::from_utf8(bytes));
    json.insert(name.to_owned(), text.and_then(Result::ok).into());
    if let (Some(Err(_)), Some(bytes)) = (text, bytes) {
        json.insert(format!("{name}Base64"), BASE64_STANDARD.encode(bytes).into());
    }
}

fn json_of(message: &Message) -> Value {
    let record = &message.record;
    let header = |(name, value): &(String, Option<Bytes>)| {
        let mut header = serde_json::Map::from_iter([("name".to_owned(), name.clone().into())]);
        put(&mut header, "value", value.as_ref());
        Value::Object(header)
    };
    let mut json = serde_json::Map::from_iter([
        ("topic".to_owned(), message.topic.as_ref().into()),
        ("partition".to_owned(), message.partition.into()),
        ("offset".to_owned(), message.offset.into()),
        ("timestampMs".to_owned(), record.timestamp_ms.into()),
        ("headers".to_owned(), record.headers.iter().map(header).collect()),
    ]);
    put(&mut json, "key", record.key.as_ref());
    put(&mut json, "value", record.value.as_ref());
    Value::Object(json)
}

fn print(message: &Message, output: Output) -> Result<(), Unwritten> {
    let text = |b: &Option<Bytes>| b.as_ref().map(|b| String::from_utf8_lossy(b).into_owned());
    let record = &message.record;
    match output {
        Output::Raw => {
            let mut line = record.value.as_deref().unwrap_or_default().to_vec();
            line.push(b'\n');
            output::write(&line)
        }
        Output::Json => output::line(json_of(message)),
        Output::Text => {
            let key = text(&record.key).map_or(String::new(), |k| format!("{k}: "));
            outln!("{}/{} {key}{}", message.partition, message.offset, text(&record.value).unwrap_or_default())
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
    let count = cluster.topic(&topic).ok_or_else(|| weir_client::Error::no_topic(&topic))?.partitions.len();
    let (sender, mut receiver) = mpsc::channel(16);
    for partition in 0..count as u32 {
        tokio::spawn(consumer::read_partition_and_say(
            client.clone(),
            topic.clone(),
            partition,
            args.from.unwrap_or(From::Latest),
            false,
            sender.clone(),
        ));
    }
    drop(sender);
    while let Some(read) = receiver.recv().await {
        let messages = match read? {
            Read::Messages(messages) => messages,
            Read::PassedOver(batch) => {
                say_passed_over(&batch, output);
                continue;
            }
        };
        for message in messages {
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

/// Says, beside what is printed, that messages are missing from it.
fn say_passed_over(batch: &PassedOver, output: Output) {
    let PassedOver { topic, partition, first, next, why } = batch;
    let last = next.saturating_sub(1);
    match output {
        Output::Json => output::note(
            serde_json::json!({"passedOver": {"topic": topic.as_ref(), "partition": partition, "firstOffset": first,
                "lastOffset": last, "error": why}}),
        ),
        Output::Text | Output::Raw => output.note(format_args!(
            "{topic}/{partition}: offsets {first} to {last} were passed over: their records cannot be decoded ({why})"
        )),
    }
}

async fn consume_subscription(client: &Client, name: &str, max: u64, output: Output) -> anyhow::Result<()> {
    let options = subscriber::Options { max: Some(max), ..Default::default() };
    // Signals are handled before partitions are opened: a consumer that ended between would drop its connections, and the messages in
    // flight from the first partitions would count as failed.
    let mut stop = Stop::new()?;
    let opening = Subscriber::open(client, name, options);
    tokio::pin!(opening);
    let opened = tokio::select! {
        opened = &mut opening => Some(opened?),
        () = stop.requested() => None,
    };
    let Some(mut subscriber) = opened else {
        return tokio::select! {
            opened = tokio::time::timeout(OPENS_WITHIN, opening) => {
                if let Ok(Ok(subscriber)) = opened {
                    subscriber.close().await;
                }
                Ok(())
            }
            () = stop.requested() => Ok(()), // a second signal
        };
    };
    let printed = tokio::select! {
        printed = print_subscription(&mut subscriber, max, output) => printed,
        () = stop.requested() => Ok(()),
    };
    // what was prefetched and not printed is for others
    subscriber.close().await;
    printed
}

async fn print_subscription(subscriber: &mut Subscriber, max: u64, output: Output) -> anyhow::Result<()> {
    for _ in 0..max {
        let Some(next) = subscriber.next().await else { break };
        let delivered = next?;
        print(&delivered.message, output)?;
        delivered.ack();
    }
    Ok(())
}

/// SIGTERM and SIGINT. Once it is created, they no longer end the process by themselves.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn new() -> anyhow::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for the next signal.
    async fn requested(&mut self) {
        tokio::select! { _ = self.terminate.recv() => {}, _ = self.interrupt.recv() => {} }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_text_is_printed_as_base64_and_every_header_in_order() {
        let header = |name: &str, value: &[u8]| (name.to_owned(), Some(Bytes::copy_from_slice(value)));
        let record = Record {
            key: Some(Bytes::from_static(b"\xff\xfe")),
            value: None,
            headers: vec![header("a", b"1"), header("b", b"\x80"), ("a".to_owned(), None)],
            timestamp_ms: 5,
        };
        let message = Message {
            topic: "default/t".into(),
            topic_id: 7,
            partition: 1,
            offset: 2,
            append_time_ms: 3,
            delivery: 1,
            record,
        };
        let expected = serde_json::json!({
            "topic": "default/t", "partition": 1, "offset": 2, "timestampMs": 5, "key": null, "keyBase64": "//4=", "value": null,
            "headers": [{"name": "a", "value": "1"}, {"name": "b", "value": null, "valueBase64": "gA=="}, {"name": "a", "value": null}],
        });
        assert_eq!(json_of(&message), expected);
    }
}
