//! The memory of a broker whose readers are slow, or ask for batches that hold far more than their bytes: bounded by its budgets, and
//! another client is served meanwhile.

mod cluster;

use bytes::Bytes;
use cluster::{Cluster, PATIENCE, make_topic, make_topic_of, pid_of, spec, subscribe};
use futures::StreamExt as _;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tonic::transport::{Channel, Endpoint};
use weir_client::Client;
use weir_proto::records::{self, Compression, Record};
use weir_proto::v1;
use weir_proto::v1::log_client::LogClient;
use weir_proto::v1::publisher_client::PublisherClient;
use weir_proto::v1::subscriber_client::SubscriberClient;

/// Two budgets of 256 MiB, for messages on their way and for decompressed records, and 128 MiB for the rest.
const RSS_MIB_MAX: u64 = 640;
/// How long the load lasts at least; longer until all who are to be served were.
const LOADED_FOR: Duration = Duration::from_secs(10);
/// Publishes of another client that are acknowledged under load.
const SERVED_MIN: usize = 200;
/// Messages with large headers.
const LARGE_HEADERS: u64 = 1_000;
/// Partitions of the topic with compressed batches.
const PARTITIONS: u32 = 8;

/// MiB that a broker has in memory.
fn rss_mib(cluster: &Cluster) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid_of(cluster.data.path()).unwrap())).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

/// A connection whose windows take a part of one answer.
async fn narrow(cluster: &Cluster) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{}", cluster.servers)).unwrap();
    endpoint.initial_stream_window_size(16_384).initial_connection_window_size(65_535).connect().await.unwrap()
}

async fn publish_batches(cluster: &Cluster, topic: &str, partition: u32, batch: Bytes, count: u64) {
    let channel = Client::new(&cluster.servers).unwrap().channel(&cluster.servers).unwrap();
    let batch =
        move |id| v1::PublishBatch { id, topic: topic.into(), partition, batch: batch.clone(), ..Default::default() };
    let batches: Vec<v1::PublishBatch> = (1..=count).map(batch).collect();
    let mut publisher = PublisherClient::new(channel).max_encoding_message_size(64 << 20);
    let mut acks = publisher.publish_stream(futures::stream::iter(batches)).await.unwrap().into_inner();
    for _ in 0..count {
        let outcome = acks.message().await.unwrap().unwrap().outcome.unwrap();
        assert!(matches!(outcome, v1::publish_ack::Outcome::BaseOffset(_)), "{outcome:?}");
    }
}

fn batch(records: &[Record], compression: Compression) -> Bytes {
    records::encode(records, compression, None).unwrap()
}

/// A client that publishes a small message now and then, on a thread of its own, so that what the load takes in this process is not
/// in its times.
struct Other {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicUsize>,
    times: std::thread::JoinHandle<Vec<Duration>>,
}

impl Other {
    fn start(cluster: &Cluster) -> Self {
        let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (servers, stopped, count) = (cluster.servers.clone(), stop.clone(), served.clone());
        let times = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(publish_small(servers, &stopped, &count))
        });
        Self { stop, served, times }
    }

    /// Publishes acknowledged so far.
    fn served(&self) -> usize {
        self.served.load(Ordering::Relaxed)
    }

    /// How long a publish took, of a hundred of which 99 took less.
    fn p99(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        let mut times = self.times.join().unwrap();
        times.sort_unstable();
        times[times.len() * 99 / 100]
    }
}

async fn publish_small(servers: String, stop: &AtomicBool, served: &AtomicUsize) -> Vec<Duration> {
    let channel = Endpoint::from_shared(format!("http://{servers}")).unwrap().connect().await.unwrap();
    let mut publisher = PublisherClient::new(channel);
    let mut times = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let messages = vec![v1::Message { value: Some(vec![b'x'; 100].into()), ..Default::default() }];
        let request = v1::PublishRequest { topic: "other".into(), partition: Some(0), messages, ..Default::default() };
        let begun = Instant::now();
        publisher.publish(request).await.unwrap();
        times.push(begun.elapsed());
        served.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    times
}

/// Readers that take one piece of what they ask for, and then nothing.
async fn pause_readers(cluster: &Cluster, paused: &mut Vec<tokio::task::JoinHandle<()>>) {
    for _ in 0..4 {
        let channel = narrow(cluster).await;
        for at in 0..100 {
            let channel = channel.clone();
            paused.push(tokio::spawn(async move {
                let fetch = v1::FetchRequest { topic: "large".into(), bytes_max: Some(8 << 20), ..Default::default() };
                if at % 2 == 0 {
                    let stream = LogClient::new(channel).fetch_stream(fetch).await;
                    std::future::pending::<()>().await;
                    drop(stream);
                } else {
                    // (a window that opens for one message in a hundred of them)
                    let _ = LogClient::new(channel).max_decoding_message_size(64 << 20).fetch(fetch).await;
                }
            }));
        }
    }
    for at in 0..4 {
        let channel = narrow(cluster).await;
        for member in 0..50 {
            let open = v1::PullOpen {
                subscription: "paused".into(),
                member: format!("{at}-{member}"),
                messages: true,
                ..Default::default()
            };
            let first = v1::PullRequest { open: Some(open), credit_messages: 10_000, ..Default::default() };
            let requests = futures::stream::iter([first]).chain(futures::stream::pending());
            let channel = channel.clone();
            paused.push(tokio::spawn(async move {
                let stream = SubscriberClient::new(channel).streaming_pull(requests).await;
                std::future::pending::<()>().await;
                drop(stream);
            }));
        }
    }
}

/// Messages that readers got which read, by subscription.
type Pulled = Arc<Mutex<BTreeMap<&'static str, u64>>>;

/// Takes messages of a subscription, one call after the other, and counts them.
async fn pull_all(channel: Channel, subscription: &'static str, member: String, pulled: Pulled, stop: Arc<AtomicBool>) {
    let mut subscriber = SubscriberClient::new(channel).max_decoding_message_size(64 << 20);
    while !stop.load(Ordering::Relaxed) {
        let pull = v1::PullMessagesRequest {
            subscription: subscription.into(),
            member: member.clone(),
            messages_max: Some(1_000),
            wait_ms: 500,
            ..Default::default()
        };
        let count = subscriber.pull(pull).await.map_or(0, |answer| answer.into_inner().messages.len() as u64);
        *pulled.lock().unwrap().entry(subscription).or_default() += count;
    }
}

async fn prepare(cluster: &Cluster) {
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "other", 1, 1).await;
    make_topic(&client, "headers", 1, 1).await;
    make_topic(&client, "large", 1, 1).await;
    let topic = v1::TopicSpec { partitions: PARTITIONS, replicas: 1, ..Default::default() };
    make_topic_of(&client, "compressed", topic).await;
    for (subscription, topic) in
        [("paused", "large"), ("h", "headers"), ("a", "compressed"), ("b", "compressed"), ("c", "compressed")]
    {
        let mut wanted = spec(topic, v1::SubscriptionMode::Shared);
        wanted.deliveries_max = Some(3);
        wanted.ack_deadline_ms = Some(3_600_000); // nothing comes again because this machine is slow
        subscribe(&client, subscription, wanted).await.unwrap();
    }
    let noise = |bytes: usize| -> Bytes { (0..bytes / 4).flat_map(|_| fastrand::u32(..).to_be_bytes()).collect() };
    let large = batch(&[Record { value: Some(noise(1 << 19)), ..Default::default() }], Compression::None);
    publish_batches(cluster, "large", 0, large, 80).await;
    let header = ("h".to_owned(), Some(noise(20_000)));
    let small = Record { value: Some("1".into()), headers: vec![header], ..Default::default() };
    publish_batches(cluster, "headers", 0, batch(&vec![small; 50], Compression::None), 20).await;
    // 30 MiB in 30 KiB
    let full =
        batch(&vec![Record { value: Some(vec![0; 1 << 20].into()), ..Default::default() }; 30], Compression::Gzip);
    for partition in 0..PARTITIONS {
        publish_batches(cluster, "compressed", partition, full.clone(), 6).await;
    }
}

/// Paused readers and subscribers, and readers of batches that hold much and of large headers, all at one time, until readers that read
/// and the other client were served. Gives the MiB that the broker had at most, and what was read.
async fn load(cluster: &Cluster, other: &Other) -> (u64, BTreeMap<&'static str, u64>) {
    let mut paused = Vec::new();
    pause_readers(cluster, &mut paused).await;
    let (pulled, stop) = (Pulled::default(), Arc::new(AtomicBool::new(false)));
    let mut pulls = tokio::task::JoinSet::new();
    for (at, subscription) in ["a", "b", "c", "a", "b", "c", "h"].into_iter().enumerate() {
        let channel = Endpoint::from_shared(format!("http://{}", cluster.servers)).unwrap().connect().await.unwrap();
        pulls.spawn(pull_all(channel, subscription, at.to_string(), pulled.clone(), stop.clone()));
    }
    let (begun, before, mut most) = (Instant::now(), other.served(), 0);
    loop {
        most = most.max(rss_mib(cluster));
        let (seen, served) = (pulled.lock().unwrap().clone(), other.served() - before);
        let is_served = ["a", "b", "c"].iter().all(|s| seen.get(s).is_some_and(|count| *count > 0));
        let all = is_served && seen.get("h").is_some_and(|count| *count >= LARGE_HEADERS) && served >= SERVED_MIN;
        if all && begun.elapsed() > LOADED_FOR {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "{served} publishes of another client, and readers that read: {seen:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    stop.store(true, Ordering::Relaxed);
    while pulls.join_next().await.is_some() {}
    paused.into_iter().for_each(|reader| reader.abort());
    let pulled = pulled.lock().unwrap().clone();
    (most, pulled)
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_readers_and_batches_that_hold_much_leave_memory_and_others_alone() {
    let cluster = Cluster::start(1);
    prepare(&cluster).await;
    let other = Other::start(&cluster);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let usual = other.p99();
    let other = Other::start(&cluster);
    let (rss_mib, pulled) = load(&cluster, &other).await;
    println!(
        "another client's p99: {usual:?} without load, {:?} under load; {rss_mib} MiB at most; {pulled:?}",
        other.p99()
    );
    assert!(rss_mib < RSS_MIB_MAX, "{rss_mib} MiB");
    assert_eq!(pulled["h"], LARGE_HEADERS, "each once: an answer that a client cannot read would come again");
}
