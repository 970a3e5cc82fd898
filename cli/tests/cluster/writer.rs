//! Load with a history, and the history held against what is stored in the end.

use super::{make_topic, read, until};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use weir_checker::{Event, History, Log, Place, Report};
use weir_client::producer::{Options, Producer};
use weir_client::{Client, Record};

/// What was offered and acknowledged: records are (key, number).
pub(crate) type Seen = History<(u32, u64)>;

pub(crate) struct Writer {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
    /// of each key: its last ack, and the longest gap between two
    last_ack: Arc<Mutex<HashMap<u32, (Instant, Duration)>>>,
    unknown: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Writer {
    /// Makes a topic of three replicas and writes to it: twelve keys, each in order, values `key-number`, padded to 1 KiB.
    pub(crate) async fn start(client: &Client, topic: &str, partitions: u32) -> Self {
        make_topic(client, topic, partitions, 3).await;
        Self::start_on(client, topic).await
    }

    /// The same on a topic that is there.
    pub(crate) async fn start_on(client: &Client, topic: &str) -> Self {
        Self::start_paced(client, topic, Duration::ZERO).await
    }

    /// The same with a pause after each twenty records of a key.
    pub(crate) async fn start_paced(client: &Client, topic: &str, pause: Duration) -> Self {
        let mut writer = Self {
            stop: Arc::default(),
            seen: Arc::default(),
            last_ack: Arc::default(),
            unknown: Arc::default(),
            tasks: Vec::new(),
        };
        let producer = Producer::open(client, topic, Options::default()).await.unwrap();
        for key in 0..12 {
            let (producer, seen, stop) = (producer.clone(), writer.seen.clone(), writer.stop.clone());
            let (last_ack, unknown) = (writer.last_ack.clone(), writer.unknown.clone());
            writer.tasks.push(tokio::spawn(async move {
                let mut number = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    let mut under_way = Vec::new();
                    for _ in 0..20 {
                        let name = (key, number);
                        number += 1;
                        seen.lock().unwrap().push(Event::Offered { producer: key.into(), value: name });
                        let mut value = format!("{key}-{}", name.1).into_bytes();
                        value.resize(1024, b' ');
                        let record = Record {
                            key: Some(format!("k{key}").into()),
                            value: Some(value.into()),
                            ..Default::default()
                        };
                        under_way.push((name, producer.send(record).await.unwrap()));
                    }
                    for (name, outcome) in under_way {
                        match outcome.await {
                            Ok(at) => {
                                let at = Place { partition: at.partition, offset: at.offset };
                                seen.lock().unwrap().push(Event::Acked { value: name, at });
                                let mut all = last_ack.lock().unwrap();
                                let last = all.entry(key).or_insert((Instant::now(), Duration::ZERO));
                                last.1 = last.1.max(last.0.elapsed());
                                last.0 = Instant::now();
                            }
                            other => {
                                if unknown.fetch_add(1, Ordering::Relaxed) == 0 {
                                    println!("the first that came to nothing: {other:?}");
                                }
                            }
                        }
                    }
                    tokio::time::sleep(pause).await;
                }
            }));
        }
        writer
    }

    /// The longest gap between two acks of one key since it was asked last: every partition whose leader was killed has its share.
    pub(crate) fn take_gap(&self) -> Duration {
        let mut all = self.last_ack.lock().unwrap();
        let gap = all.values().map(|(last, gap)| last.elapsed().max(*gap)).max().unwrap_or_default();
        all.values_mut().for_each(|(_, gap)| *gap = Duration::ZERO);
        gap
    }

    /// Records acknowledged so far.
    pub(crate) fn acknowledged(&self) -> usize {
        self.seen.lock().unwrap().acknowledged()
    }

    /// Waits until so many more records are acknowledged.
    pub(crate) async fn goes_on(&self, more: usize) {
        let before = self.acknowledged();
        until("more is acknowledged", async || match self.acknowledged() - before {
            count if count < more => Err(count),
            _ => Ok(()),
        })
        .await;
    }

    /// Ends at once, whatever is under way: its brokers are gone.
    pub(crate) fn abandon(self) -> Seen {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
        std::mem::take(&mut *self.seen.lock().unwrap())
    }

    pub(crate) async fn finish(self) -> (Seen, u64) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
        let seen = std::mem::take(&mut *self.seen.lock().unwrap());
        (seen, self.unknown.load(Ordering::Relaxed))
    }
}

/// Reads all partitions from the beginning and holds them against what was seen.
pub(crate) async fn check(client: &Client, topic: &str, partitions: u32, seen: &Seen) {
    report(client, topic, partitions, seen).await.assert_clean();
}

pub(crate) async fn report(client: &Client, topic: &str, partitions: u32, seen: &Seen) -> Report<(u32, u64)> {
    let mut logs = Vec::new();
    for partition in 0..partitions {
        let mut records = Vec::new();
        read(client, topic, partition, |message| {
            assert_eq!(message.offset, records.len() as u64, "offsets run on without gaps");
            let value = message.record.value.unwrap();
            let (key, number) = std::str::from_utf8(&value).unwrap().trim_end().split_once('-').unwrap();
            records.push((message.offset, (key.parse().unwrap(), number.parse().unwrap())));
        })
        .await;
        logs.push(Log { of: "reader".to_owned(), partition, start: 0, records });
    }
    seen.check(&logs)
}
