//! What message queues do, over three real processes: dead letters, counts that survive failovers, filters, rates, request and reply.

mod cluster;

use cluster::{Cluster, PATIENCE, backlog, make_topic, read_all, refreshed, spec, subscribe, until_is, weir};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use weir_client::consumer::Message;
use weir_client::producer::{Options, Producer};
use weir_client::requester::{Requester, reply};
use weir_client::subscriber::Subscriber;
use weir_client::{Client, Error, Record};
use weir_proto::v1;

fn numbered(number: u64) -> Record {
    let parity = if number.is_multiple_of(2) { "even" } else { "odd" };
    let headers = vec![("parity".to_owned(), Some(parity.into()))];
    Record {
        key: Some(format!("k{}", number % 11).into()),
        value: Some(number.to_string().into()),
        headers,
        ..Default::default()
    }
}

fn number(message: &Message) -> u64 {
    std::str::from_utf8(message.record.value.as_ref().unwrap()).unwrap().parse().unwrap()
}

async fn publish(client: &Client, topic: &str, numbers: std::ops::Range<u64>) {
    let producer = Producer::open(client, topic, Options::default()).await.unwrap();
    let mut under_way = Vec::new();
    for at in numbers {
        under_way.push(producer.send(numbered(at)).await.unwrap());
    }
    for outcome in under_way {
        outcome.await.unwrap();
    }
}

/// Takes messages until told to stop: those of `poison` are refused, the others acked.
async fn member(client: Client, poison: fn(u64) -> bool, acked: Arc<Mutex<BTreeMap<u64, u32>>>, stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::Relaxed) {
        let Ok(mut subscriber) = Subscriber::open(&client, "s", Default::default()).await else { continue };
        let until = Instant::now() + Duration::from_millis(2_500); // members come and go
        while Instant::now() < until && !stop.load(Ordering::Relaxed) {
            let Ok(next) = tokio::time::timeout(Duration::from_millis(100), subscriber.next()).await else { continue };
            let Some(Ok(delivered)) = next else { break };
            let at = number(&delivered.message);
            if poison(at) {
                delivered.nack(None);
            } else {
                *acked.lock().unwrap().entry(at).or_default() += 1;
                delivered.ack();
            }
        }
        subscriber.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_message_is_acked_or_a_dead_letter_once_while_leaders_are_killed() {
    const COUNT: u64 = 3_000;
    let poison = |at: u64| at % 50 == 3;
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 2, 3).await;
    make_topic(&client, "dead", 2, 3).await;
    let wanted = v1::SubscriptionSpec {
        deliveries_max: Some(3),
        dead_letter_topic: "dead".into(),
        backoff_min_ms: 20,
        backoff_max_ms: Some(200),
        ..spec("t", v1::SubscriptionMode::Shared)
    };
    subscribe(&client, "s", wanted).await.unwrap();
    let (acked, stop): (Arc<Mutex<BTreeMap<u64, u32>>>, Arc<AtomicBool>) = Default::default();
    let members: Vec<_> =
        (0..3).map(|_| tokio::spawn(member(client.clone(), poison, acked.clone(), stop.clone()))).collect();
    for at in 0..3 {
        publish(&client, "t", at * COUNT / 3..(at + 1) * COUNT / 3).await;
        cluster.kill(["weir-0", "weir-1", "weir-2"][at as usize]);
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
    let good = (0..COUNT).filter(|at| !poison(*at)).count();
    let bad: BTreeSet<u64> = (0..COUNT).filter(|at| poison(*at)).collect();
    let end = Instant::now() + PATIENCE;
    let dead = loop {
        let dead = read_all(&client, "dead", 2).await;
        let done = acked.lock().unwrap().len();
        if done == good && dead.len() >= bad.len() {
            break dead;
        }
        assert!(Instant::now() < end, "{done} of {good} acked, {} of {} dead", dead.len(), bad.len());
        tokio::time::sleep(Duration::from_millis(300)).await;
    };
    stop.store(true, Ordering::Relaxed);
    for member in members {
        member.await.unwrap();
    }
    // nothing more comes, and nothing was moved twice
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(read_all(&client, "dead", 2).await.len(), bad.len());
    assert_eq!(dead.iter().map(number).collect::<BTreeSet<_>>(), bad);
    let header = |m: &Message, name: &str| m.record.header(name).cloned();
    for message in &dead {
        assert_eq!(header(message, "weir-dead-subscription").unwrap(), "default/s");
        assert_eq!(header(message, "weir-dead-deliveries").unwrap(), "3");
    }
    let again = acked.lock().unwrap().values().filter(|n| **n > 1).count();
    println!("{good} acked ({again} of them more than once), {} dead letters, each once; 3 leaders killed", bad.len());
    // somebody mended what failed: the dead letters go back, to this subscription only
    subscribe(&client, "other", spec("t", v1::SubscriptionMode::Shared)).await.unwrap();
    let said = weir(&cluster, &["subscription", "redrive", "s"]);
    assert_eq!(said, format!("{} dead letters of s were put back\n", bad.len()));
    let mut subscriber = Subscriber::open(&client, "s", Default::default()).await.unwrap();
    let mut redriven = BTreeSet::new();
    while redriven.len() < bad.len() {
        let next =
            tokio::time::timeout(PATIENCE, subscriber.next()).await.expect("a redriven message").unwrap().unwrap();
        redriven.insert(number(&next.message));
        next.ack();
    }
    assert_eq!(redriven, bad);
    subscriber.close().await;
    assert_eq!(weir(&cluster, &["subscription", "redrive", "s"]), "0 dead letters of s were put back\n");
    let mut other = Subscriber::open(&client, "other", Default::default()).await.unwrap();
    let mut seen = Vec::new();
    while seen.len() < COUNT as usize {
        let next = tokio::time::timeout(PATIENCE, other.next()).await.expect("all of them").unwrap().unwrap();
        seen.push(number(&next.message));
        next.ack();
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..COUNT).collect::<Vec<_>>(), "each once");
    let more = tokio::time::timeout(Duration::from_secs(2), other.next()).await;
    assert!(more.is_err(), "none of those put back for another");
}

#[tokio::test(flavor = "multi_thread")]
async fn deliveries_are_counted_on_after_the_leader_was_killed() {
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 1, 3).await;
    subscribe(&client, "s", spec("t", v1::SubscriptionMode::Failover)).await.unwrap();
    publish(&client, "t", 0..1).await;
    let mut subscriber = Subscriber::open(&client, "s", Default::default()).await.unwrap();
    let mut deliveries = Vec::new();
    for at in 0..4 {
        let next = tokio::time::timeout(PATIENCE, subscriber.next()).await.expect("it comes again").unwrap().unwrap();
        deliveries.push(next.message.delivery);
        if at != 1 {
            next.nack(Some(Duration::from_millis(300)));
            continue;
        }
        let leader = refreshed(&client).await.leader("t", 0).unwrap();
        let mut calls = v1::subscriber_client::SubscriberClient::new(client.channel(&leader).unwrap());
        let failed = v1::Nacked { start: 0, end: 1, delay_ms: Some(300), uncounted: false };
        let nack = v1::NackRequest { subscription: "s".into(), offsets: vec![failed], ..Default::default() };
        calls.nack(nack).await.unwrap();
        // what is acknowledged after it, though it is nothing, is in the log with the count or behind it
        let nothing = vec![v1::OffsetRange { start: 1, end: 2 }];
        let barrier = v1::AcknowledgeRequest { subscription: "s".into(), offsets: nothing, ..Default::default() };
        assert_eq!(calls.acknowledge(barrier).await.unwrap().into_inner().acknowledged, 0);
        drop(next);
        let cluster_now = client.cluster();
        let name = &cluster_now.metadata.brokers.iter().find(|b| b.client_address == leader).unwrap().name;
        cluster.kill(name);
    }
    assert_eq!(deliveries, [1, 2, 3, 4]);
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_choose_and_rates_hold_back() {
    let cluster = Cluster::start(1);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 2, 1).await;
    let bad =
        v1::SubscriptionSpec { filter: "headers.parity = 'even'".into(), ..spec("t", v1::SubscriptionMode::Shared) };
    let Err(Error::Refused { reason, message, .. }) = subscribe(&client, "s", bad).await else {
        panic!("it was taken")
    };
    assert_eq!(reason, "FILTER");
    assert!(message.starts_with("filter, column 16"), "{message}");
    for mode in [v1::SubscriptionMode::Shared, v1::SubscriptionMode::Exclusive] {
        let even = v1::SubscriptionSpec { filter: "headers.parity == 'even'".into(), ..spec("t", mode) };
        subscribe(&client, &format!("even-{}", mode as i32), even).await.unwrap();
    }
    let slow = v1::SubscriptionSpec {
        messages_per_second: Some(200),
        burst_messages: Some(20),
        ..spec("t", v1::SubscriptionMode::Shared)
    };
    subscribe(&client, "slow", slow).await.unwrap();
    publish(&client, "t", 0..1_000).await;
    for name in ["even-2", "even-0"] {
        let mut subscriber = Subscriber::open(&client, name, Default::default()).await.unwrap();
        let mut seen = Vec::new();
        while seen.len() < 500 {
            let next = tokio::time::timeout(PATIENCE, subscriber.next()).await.expect("half of them").unwrap().unwrap();
            seen.push(number(&next.message));
            next.ack();
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..500).map(|at| at * 2).collect::<Vec<_>>(), "{name}");
        subscriber.close().await;
        // what was left out counts as done: nothing holds the log
        until_is("nothing is left", 0, async || backlog(&client, name, &["t"]).await).await;
    }
    let begun = Instant::now();
    let mut subscriber = Subscriber::open(&client, "slow", Default::default()).await.unwrap();
    for _ in 0..400 {
        let next = tokio::time::timeout(PATIENCE, subscriber.next()).await.expect("slowly").unwrap().unwrap();
        next.ack();
    }
    // 400 of them at 200 a second, but for a burst of 20: a lower bound, whatever else the machine does
    assert!(begun.elapsed() > Duration::from_millis(1_800), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_reach_their_asker_at_whatever_broker_it_is() {
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "work", 3, 3).await;
    subscribe(&client, "worker", spec("work", v1::SubscriptionMode::Shared)).await.unwrap();
    let worker = client.clone();
    let task = tokio::spawn(async move {
        let mut subscriber = Subscriber::open(&worker, "worker", Default::default()).await.unwrap();
        while let Some(Ok(job)) = subscriber.next().await {
            let doubled = (number(&job.message) * 2).to_string();
            let answer = Record { value: Some(doubled.into()), ..Default::default() };
            let first = reply(&worker, &job.message.record, answer.clone()).await;
            if first.is_ok() {
                let _ = reply(&worker, &job.message.record, answer).await; // twice: the second is dropped
            }
            job.ack();
        }
    });
    let mut asked = Vec::new();
    for server in cluster.servers.split(',') {
        let asker = Client::new(server).unwrap();
        asked.push(tokio::spawn(async move {
            let requester = Requester::open(&asker);
            for at in 0..40 {
                let answer = requester.request("work", numbered(at), PATIENCE).await.unwrap();
                assert_eq!(answer.value.unwrap(), (at * 2).to_string());
            }
        }));
    }
    for asker in asked {
        asker.await.unwrap();
    }
    let late = Requester::open(&client).request("work", numbered(1), Duration::ZERO).await;
    assert!(matches!(late, Err(Error::Deadline { .. })), "{late:?}");
    assert!(!task.is_finished(), "an asker that is gone is no failure of the worker");
    task.abort();
    let gone = Record {
        headers: vec![
            ("weir-reply-to".into(), Some("1/nobody".into())),
            ("weir-correlation-id".into(), Some("x".into())),
        ],
        ..Default::default()
    };
    let Err(Error::Refused { reason, .. }) = reply(&client, &gone, Record::default()).await else {
        panic!("answered nobody")
    };
    assert_eq!(reason, "NO_INBOX");
}
