//! What consumers have prefetched when they leave was seen by nobody: it never becomes a dead letter.

mod cluster;

use cluster::{Cluster, PATIENCE, make_topic, read_all, spec, subscribe, until_is, weir};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use weir_client::producer::{Options, Producer};
use weir_client::subscriber::{self, Subscriber};
use weir_client::{Client, Record};
use weir_proto::v1;

const COUNT: u64 = 40;

async fn begin(cluster: &Cluster, partitions: u32) -> Client {
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", partitions, 1).await;
    make_topic(&client, "dead", 1, 1).await;
    let wanted = v1::SubscriptionSpec {
        deliveries_max: Some(3),
        dead_letter_topic: "dead".into(),
        ..spec("t", v1::SubscriptionMode::Shared)
    };
    subscribe(&client, "s", wanted).await.unwrap();
    let producer = Producer::open(&client, "t", Options::default()).await.unwrap();
    for at in 0..COUNT {
        let key = Some(at.to_string().into());
        let record = Record { key, value: Some(at.to_string().into()), ..Default::default() };
        producer.send(record).await.unwrap().await.unwrap();
    }
    client
}

/// Takes what is left: each for the first time, and no dead letter is anywhere.
async fn take_rest(client: &Client, left: u64) {
    let mut rest = Subscriber::open(client, "s", Default::default()).await.unwrap();
    for _ in 0..left {
        let next = tokio::time::timeout(PATIENCE, rest.next()).await.expect("what was not acknowledged is delivered");
        let delivered = next.unwrap().unwrap();
        assert_eq!(delivered.message.delivery, 1, "offset {}", delivered.message.offset);
        delivered.ack();
    }
    rest.close().await;
    assert_eq!(read_all(client, "dead", 1).await.len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn consumers_that_take_one_message_and_leave_make_no_dead_letters() {
    let cluster = Cluster::start(1);
    let client = begin(&cluster, 2).await;
    for _ in 0..5 {
        let printed = weir(&cluster, &["consume", "--subscription", "s", "--max", "1"]);
        assert_eq!(printed.lines().count(), 1, "{printed:?}");
    }
    for _ in 0..3 {
        consumer_that_is_asked_to_end(&cluster).await;
    }
    assert_eq!(read_all(&client, "dead", 1).await.len(), 0);
}

/// Runs one that is asked to end, as Kubernetes asks, as soon as the broker delivers to it. Whatever it has printed by then is
/// acknowledged.
async fn consumer_that_is_asked_to_end(cluster: &Cluster) {
    let streams = async || {
        let metrics = cluster.metrics(0).await;
        let line = metrics.lines().find_map(|l| l.strip_prefix("weir_open_streams ")).map(str::to_owned);
        line.expect("the metric is there").parse::<u64>().unwrap()
    };
    until_is("earlier ones are gone", 0, &streams).await;
    let mut consume = Command::new(cluster::WEIR);
    consume.args(["consume", "--subscription", "s", "--max", "1000000"]).env("WEIR_SERVER", &cluster.servers);
    let mut consume = consume.stdout(Stdio::null()).spawn().unwrap();
    let end = Instant::now() + PATIENCE;
    while streams().await == 0 {
        assert!(Instant::now() < end, "it opens nothing");
    }
    assert!(Command::new("kill").args(["-TERM", &consume.id().to_string()]).status().unwrap().success());
    let status = consume.wait().unwrap();
    assert!(status.success(), "{status}");
}

/// Opening many partitions takes a while, in which messages of the first ones are delivered already.
#[tokio::test(flavor = "multi_thread")]
async fn consumers_that_are_asked_to_end_while_they_begin_make_no_failed_deliveries() {
    let cluster = Cluster::start(1);
    let client = begin(&cluster, 100).await;
    for _ in 0..3 {
        consumer_that_is_asked_to_end(&cluster).await;
    }
    let metrics = cluster.metrics(0).await;
    let dead = metrics.lines().filter(|l| l.starts_with("weir_dead_letters_total")).map(str::to_owned);
    assert_eq!(dead.collect::<Vec<_>>(), [""; 0]);
    let mut rest = Subscriber::open(&client, "s", Default::default()).await.unwrap();
    let end = Instant::now() + PATIENCE;
    while cluster::backlog(&client, "s", &["t"]).await > 0 {
        assert!(Instant::now() < end, "the backlog is never empty");
        let Ok(next) = tokio::time::timeout(Duration::from_secs(1), rest.next()).await else { continue };
        let delivered = next.unwrap().unwrap();
        assert_eq!(delivered.message.delivery, 1, "offset {}", delivered.message.offset);
        delivered.ack();
    }
    rest.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_that_is_dropped_or_closed_releases_what_nobody_saw_and_asks_for_no_more_than_it_wants() {
    let cluster = Cluster::start(1);
    let client = begin(&cluster, 1).await;
    for close in [true, false, true, false] {
        let mut subscriber = Subscriber::open(&client, "s", Default::default()).await.unwrap();
        let seen = tokio::time::timeout(PATIENCE, subscriber.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(seen.message.delivery, 1, "offset {}", seen.message.offset);
        seen.ack();
        if close {
            subscriber.close().await;
        }
    }
    // what it did not ask for is free for others while it runs
    let options = subscriber::Options { max: Some(3), ..Default::default() };
    let mut few = Subscriber::open(&client, "s", options).await.unwrap();
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(tokio::time::timeout(PATIENCE, few.next()).await.unwrap().unwrap().unwrap());
    }
    held.into_iter().for_each(|delivered| delivered.ack());
    take_rest(&client, COUNT - 4 - 3).await;
    few.close().await;
}
