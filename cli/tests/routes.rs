//! Where messages go, over three real processes: by pattern, routing key and priority, pushed, back to a snapshot, and with their ack.

mod cluster;

use cluster::{Cluster, PATIENCE, make_topic, read_all, spec, subscribe, weir};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use weir_client::producer::{Options, Producer};
use weir_client::subscriber::{self, Delivered, Subscriber};
use weir_client::{Client, Error, Record};
use weir_proto::v1;

fn record(value: &str, headers: &[(&str, &str)]) -> Record {
    let headers = headers.iter().map(|(n, v)| ((*n).to_owned(), Some((*v).to_owned().into()))).collect();
    Record { value: Some(value.to_owned().into()), headers, ..Default::default() }
}

async fn publish(client: &Client, topic: &str, records: Vec<Record>) {
    let producer = Producer::open(client, topic, Options::default()).await.unwrap();
    for record in records {
        producer.send(record).await.unwrap().await.unwrap();
    }
}

/// Asks until the answer is right: what is told may be a moment old, and of a partition without leader nothing is told.
async fn until(cluster: &Cluster, args: &[&str], right: impl Fn(&serde_json::Value) -> bool) {
    let end = Instant::now() + PATIENCE;
    loop {
        let said: serde_json::Value = serde_json::from_str(&weir(cluster, args)).unwrap();
        if right(&said) {
            return;
        }
        assert!(Instant::now() < end, "weir {args:?}: {said}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn value(delivered: &Delivered) -> String {
    String::from_utf8(delivered.message.record.value.clone().unwrap().to_vec()).unwrap()
}

async fn next(subscriber: &mut Subscriber) -> Delivered {
    let next = tokio::time::timeout(PATIENCE, subscriber.next()).await.expect("a message in time");
    next.expect("an open subscription").unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_starts_at_the_time_it_declares() {
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 2, 3).await;
    publish(&client, "t", (0..20).map(|n| record(&format!("before {n}"), &[])).collect()).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let time = std::time::SystemTime::now();
    tokio::time::sleep(Duration::from_millis(300)).await;
    publish(&client, "t", (0..20).map(|n| record(&format!("after {n}"), &[])).collect()).await;
    let start_ms = time.duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64;
    let timed = v1::SubscriptionSpec {
        start_ms: Some(start_ms),
        from_earliest: false,
        ..spec("t", v1::SubscriptionMode::Shared)
    };
    subscribe(&client, "timed", timed).await.unwrap();
    let mut reader = Subscriber::open(&client, "timed", Default::default()).await.unwrap();
    let mut found = BTreeSet::new();
    while found.len() < 20 {
        let delivered = next(&mut reader).await;
        found.insert(value(&delivered));
        delivered.ack();
    }
    assert!(found.iter().all(|v| v.starts_with("after")), "{found:?}");
    reader.close().await;
    // the same by hand
    weir(&cluster, &["subscription", "seek", "timed", "--to", &humantime::format_rfc3339_millis(time).to_string()]);
    let mut reader = Subscriber::open(&client, "timed", Default::default()).await.unwrap();
    assert!(value(&next(&mut reader).await).starts_with("after"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pattern_reads_topics_that_come_later_from_their_beginning_and_routing_keys_choose() {
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "orders.eu", 2, 3).await;
    make_topic(&client, "refunds.eu", 1, 3).await;
    subscribe(&client, "all", spec("orders.*", v1::SubscriptionMode::Shared)).await.unwrap();
    let keyed = v1::SubscriptionSpec {
        routing_keys: vec!["*.paid.#".into()],
        ..spec("orders.*", v1::SubscriptionMode::Exclusive)
    };
    subscribe(&client, "paid", keyed).await.unwrap();
    let mut all = Subscriber::open(&client, "all", Default::default()).await.unwrap();
    publish(&client, "refunds.eu", vec![record("not wanted", &[])]).await;
    publish(&client, "orders.eu", vec![record("first", &[("weir-routing-key", "eu.paid")])]).await;
    let first = next(&mut all).await;
    assert_eq!((value(&first).as_str(), &*first.message.topic), ("first", "default/orders.eu"));
    first.ack();
    make_topic(&client, "orders.us", 2, 3).await;
    let later = ["eu.open", "us.paid.cash", "paid", "us.paid"].map(|k| record(k, &[("weir-routing-key", k)]));
    publish(&client, "orders.us", later.to_vec()).await;
    let mut found = BTreeSet::new();
    while found.len() < 4 {
        let delivered = next(&mut all).await;
        assert_eq!(&*delivered.message.topic, "default/orders.us");
        found.insert(value(&delivered));
        delivered.ack();
    }
    all.close().await;
    let mut paid = Subscriber::open(&client, "paid", Default::default()).await.unwrap();
    let mut found = BTreeSet::new();
    while found.len() < 3 {
        let delivered = next(&mut paid).await;
        found.insert(value(&delivered));
        delivered.ack();
    }
    assert_eq!(found.iter().map(String::as_str).collect::<Vec<_>>(), ["first", "us.paid", "us.paid.cash"]);
    // one topic among many goes, and the others go on
    weir(&cluster, &["topic", "delete", "orders.us"]);
    publish(&client, "orders.eu", vec![record("last", &[("weir-routing-key", "eu.paid")])]).await;
    assert_eq!(value(&next(&mut paid).await), "last");
    let left = |said: &serde_json::Value| said["partitions"].as_array().is_some_and(|p| p.len() == 2);
    until(&cluster, &["subscription", "describe", "all", "-o", "json"], left).await;
    for (bad, reason) in [("orders.*x", "PATTERN"), ("Orders.#", "NAME")] {
        let refused = subscribe(&client, "bad", spec(bad, v1::SubscriptionMode::Shared)).await.unwrap_err();
        assert!(matches!(&refused, Error::Refused { reason: r, .. } if r == reason), "{refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn urgent_messages_overtake_and_one_member_holds_no_more_than_it_may() {
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 1, 3).await;
    let wanted = v1::SubscriptionSpec {
        priorities: true,
        in_flight_member_max: Some(1),
        ..spec("t", v1::SubscriptionMode::Shared)
    };
    subscribe(&client, "s", wanted.clone()).await.unwrap();
    let message = |at: usize| record(&at.to_string(), &[("weir-priority", if at >= 95 { "9" } else { "1" })]);
    publish(&client, "t", (0..100).map(message).collect()).await;
    let mut subscriber = Subscriber::open(&client, "s", Default::default()).await.unwrap();
    let mut order = Vec::new();
    while order.len() < 100 {
        let delivered = next(&mut subscriber).await;
        let at = value(&delivered).parse::<usize>().unwrap();
        if !order.contains(&at) {
            order.push(at); // where leadership moves meanwhile, one may come twice
        }
        delivered.ack();
    }
    assert_eq!(order[..5], [95, 96, 97, 98, 99]);
    assert_eq!(order[5..], (0..95).collect::<Vec<_>>());
    let ordered = v1::SubscriptionSpec { mode: v1::SubscriptionMode::KeyShared.into(), ..wanted };
    let refused = subscribe(&client, "ordered", ordered).await.unwrap_err();
    assert!(refused.to_string().contains("mode shared"), "{refused}");
}

/// An HTTP server that answers each request by what `answer` makes of its head.
async fn endpoint(answer: impl Fn(&str) -> u16 + Send + Sync + 'static) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let answer = Arc::new(answer);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let answer = answer.clone();
            tokio::spawn(async move {
                let mut seen = Vec::new();
                loop {
                    let mut part = [0; 4096];
                    let Ok(read @ 1..) = stream.read(&mut part).await else { return };
                    seen.extend_from_slice(&part[..read]);
                    let text = String::from_utf8_lossy(&seen).into_owned();
                    let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
                    let length = head.lines().find_map(|l| l.strip_prefix("content-length: ")?.parse::<usize>().ok());
                    if body.len() < length.unwrap_or(0) {
                        continue;
                    }
                    let said = format!("HTTP/1.1 {} x\r\ncontent-length: 0\r\n\r\n", answer(&text));
                    seen.clear();
                    if stream.write_all(said.as_bytes()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    format!("http://{address}/events")
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_are_pushed_until_taken_over_a_killed_leader_and_what_is_refused_becomes_a_dead_letter() {
    const COUNT: usize = 60;
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 2, 3).await;
    make_topic(&client, "dead", 1, 3).await;
    let taken: Arc<Mutex<BTreeMap<String, u32>>> = Default::default();
    let closed = Arc::new(AtomicBool::new(true));
    let (seen, shut) = (taken.clone(), closed.clone());
    let endpoint = endpoint(move |request| {
        assert!(request.contains("ce-specversion: 1.0"), "{request}");
        let body = request.rsplit("\r\n").next().unwrap_or_default().to_owned();
        if shut.load(Ordering::Relaxed) {
            return 503; // not now
        }
        if body == "poison" {
            return 400;
        }
        *seen.lock().unwrap().entry(body).or_default() += 1;
        204
    })
    .await;
    let wanted = v1::SubscriptionSpec {
        push: Some(v1::Push { endpoint, concurrency: Some(4), timeout_ms: Some(30_000) }),
        deliveries_max: Some(3),
        dead_letter_topic: "dead".into(),
        ..spec("t", v1::SubscriptionMode::Shared)
    };
    subscribe(&client, "s", wanted).await.unwrap();
    publish(&client, "t", (0..COUNT / 2).map(|at| record(&at.to_string(), &[])).collect()).await;
    tokio::time::sleep(Duration::from_secs(2)).await; // an endpoint that is away costs no message its deliveries
    closed.store(false, Ordering::Relaxed);
    publish(&client, "t", vec![record("poison", &[])]).await;
    cluster.kill("weir-0");
    publish(&client, "t", (COUNT / 2..COUNT).map(|at| record(&at.to_string(), &[])).collect()).await;
    let end = Instant::now() + PATIENCE;
    let dead = loop {
        let dead = read_all(&client, "dead", 1).await;
        if taken.lock().unwrap().len() == COUNT && !dead.is_empty() {
            break dead;
        }
        assert!(Instant::now() < end, "{} taken, {} dead", taken.lock().unwrap().len(), dead.len());
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    let dead: Vec<_> = dead.iter().map(|m| m.record.value.clone().unwrap()).collect();
    assert_eq!(dead, ["poison"]);
    let twice = taken.lock().unwrap().values().filter(|n| **n > 1).count();
    println!("{COUNT} messages pushed over a killed leader, {twice} more than once");
    let bad = v1::Push { endpoint: "mail.shop".into(), ..Default::default() };
    let bad = v1::SubscriptionSpec { push: Some(bad), ..spec("t", v1::SubscriptionMode::Shared) };
    let refused = subscribe(&client, "bad", bad).await.unwrap_err();
    assert!(refused.to_string().contains("begins with http://"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_brings_back_what_was_not_acked_then() {
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 2, 3).await;
    subscribe(&client, "s", spec("t", v1::SubscriptionMode::Shared)).await.unwrap();
    publish(&client, "t", (0..40).map(|at| record(&at.to_string(), &[])).collect()).await;
    let mut subscriber = Subscriber::open(&client, "s", Default::default()).await.unwrap();
    let mut held = Vec::new();
    let mut acked = BTreeSet::new();
    for at in 0..40 {
        let delivered = next(&mut subscriber).await;
        if at % 2 == 0 {
            acked.insert(value(&delivered));
            delivered.ack();
        } else {
            held.push(delivered);
        }
    }
    let until_behind = async |wanted: u64| {
        let is = |said: &serde_json::Value| {
            said["backlog"] == wanted && said["partitions"].as_array().is_some_and(|p| p.len() == 2)
        };
        until(&cluster, &["subscription", "describe", "s", "-o", "json"], is).await;
    };
    until_behind(20).await;
    weir(&cluster, &["subscription", "snapshot", "s", "half"]);
    held.into_iter().for_each(Delivered::ack);
    until_behind(0).await;
    subscriber.close().await;
    cluster.kill("weir-1"); // it is replicated as acks are
    let listed = ["subscription", "snapshots", "s", "-o", "json"];
    until(&cluster, &listed, |said| said[0]["holds"] == 20).await;
    weir(&cluster, &["subscription", "seek", "s", "--to-snapshot", "half"]);
    until_behind(20).await;
    let mut subscriber = Subscriber::open(&client, "s", Default::default()).await.unwrap();
    for _ in 0..20 {
        let delivered = next(&mut subscriber).await;
        assert!(!acked.contains(&value(&delivered)), "{} was acked before the snapshot", value(&delivered));
        delivered.ack();
    }
    until_behind(0).await;
    assert!(subscriber::seek_to_snapshot(&client, "s", "none").await.unwrap_err().to_string().contains("no snapshot"));
    weir(&cluster, &["subscription", "snapshot", "s", "half", "--delete"]);
    until(&cluster, &listed, |said| *said == serde_json::json!([])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_is_published_once_with_its_ack_while_leaders_are_killed() {
    const COUNT: usize = 400;
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "work", 2, 3).await;
    make_topic(&client, "results", 2, 3).await;
    let quick = v1::SubscriptionSpec { ack_deadline_ms: Some(2_000), ..spec("work", v1::SubscriptionMode::Shared) };
    subscribe(&client, "s", quick).await.unwrap();
    let mut subscriber = Subscriber::open(&client, "s", Default::default()).await.unwrap();
    publish(&client, "work", (0..COUNT).map(|at| record(&at.to_string(), &[])).collect()).await;
    let mut done = 0;
    let mut kills = vec![(100, "weir-0"), (250, "weir-1")];
    let end = Instant::now() + PATIENCE;
    while done < COUNT && Instant::now() < end {
        let delivered = next(&mut subscriber).await;
        let result = record(&format!("result of {}", value(&delivered)), &[]);
        if kills.first().is_some_and(|(at, _)| done >= *at) {
            cluster.kill(kills.remove(0).1);
        }
        match delivered.ack_with_publish("results", vec![result]).await {
            Ok(_) => done += 1,
            Err(Error::Refused { reason, .. }) => assert_eq!(reason, "NOT_DELIVERED"), // it comes again
            Err(Error::Deadline { .. }) => {}
            Err(other) => panic!("{other:?}"),
        }
        // one that came again after its first answer was lost is counted once, by its result
        if done.is_multiple_of(50) || done + 20 > COUNT {
            done = done.min(read_all(&client, "results", 2).await.len());
        }
    }
    let results = read_all(&client, "results", 2).await;
    let distinct: BTreeSet<_> = results.iter().map(|m| m.record.value.clone().unwrap()).collect();
    assert_eq!((results.len(), distinct.len()), (COUNT, COUNT), "each result once");
    until(&cluster, &["subscription", "describe", "s", "-o", "json"], |said| said["backlog"] == 0).await;
}
