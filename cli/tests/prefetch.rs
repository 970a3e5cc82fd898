//! What consumers have prefetched when they leave was seen by nobody: it never becomes a dead letter.

mod cluster;

use cluster::{Cluster, PATIENCE, make_topic, read_all, spec, subscribe, weir};
use std::process::{Command, Stdio};
use std::time::Duration;
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
    // one that is asked to end, as Kubernetes asks
    for _ in 0..3 {
        let mut consume = Command::new(cluster::WEIR);
        consume.args(["consume", "--subscription", "s", "--max", "1000000"]).env("WEIR_SERVER", &cluster.servers);
        let mut consume = consume.stdout(Stdio::null()).spawn().unwrap();
        // (whatever it has printed by then is acknowledged)
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(Command::new("kill").args(["-TERM", &consume.id().to_string()]).status().unwrap().success());
        assert!(consume.wait().unwrap().success());
    }
    assert_eq!(read_all(&client, "dead", 1).await.len(), 0);
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
