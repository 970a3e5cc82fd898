//! Subscriptions of every mode over real processes: members that come and go, leaders that are killed, one call at a time.

mod cluster;

use cluster::{Cluster, PATIENCE, WEIR, backlog, make_subscription, make_topic, start, weir};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use weir_client::consumer::{Message, Pull};
use weir_client::producer::{Options, Producer};
use weir_client::{Client, Record};
use weir_proto::v1;
use weir_proto::v1::SubscriptionMode;

/// Publishes `count` messages over `keys` keys; each value is `key number`.
async fn publish(client: &Client, topic: &str, keys: u32, count: u64) {
    let producer = Producer::open(client, topic, Options::default()).await.unwrap();
    let mut under_way = Vec::new();
    for number in 0..count {
        let key = number % u64::from(keys);
        let value = format!("{key} {number}");
        let record = Record { key: Some(format!("k{key}").into()), value: Some(value.into()), ..Default::default() };
        under_way.push(producer.send(record).await.unwrap());
        if number % 250 == 249 {
            // so that members come and go, and leaders die, while messages flow
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    for outcome in under_way {
        outcome.await.unwrap();
    }
}

fn parse(message: &Message) -> (u32, u64) {
    let value = message.record.value.as_ref().unwrap();
    let (key, number) = std::str::from_utf8(value).unwrap().split_once(' ').unwrap();
    (key.parse().unwrap(), number.parse().unwrap())
}

#[derive(Default)]
struct Seen {
    /// (key, number) → how often it was delivered
    messages: HashMap<(u32, u64), u32>,
    /// of each key: numbers in the order they were first acked
    order: BTreeMap<u32, Vec<u64>>,
}

/// Works on messages: one in a hundred is refused when it comes first, and what follows it with its key is left alone until it comes
/// again, since that comes again too: also what was on its way already when it was refused. `held_up` remembers over the lists of one
/// stream which keys wait for which number. Gives what is done, and the offsets that are refused.
fn work(messages: &[Message], seen: &mut Seen, held_up: &mut HashMap<u32, u64>) -> (Vec<Message>, Vec<u64>) {
    let (mut done, mut refused) = (Vec::new(), Vec::new());
    for message in messages {
        let (key, number) = parse(message);
        let count = seen.messages.entry((key, number)).or_default();
        *count += 1;
        match held_up.get(&key) {
            Some(waits_for) if number > *waits_for => continue,
            Some(waits_for) if number == *waits_for => drop(held_up.remove(&key)),
            _ => {}
        }
        if *count == 1 && number % 100 == 7 {
            refused.push(message.offset);
            held_up.insert(key, number);
            continue;
        }
        let order = seen.order.entry(key).or_default();
        if !order.contains(&number) {
            order.push(number);
        }
        done.push(message.clone());
    }
    (done, refused)
}

/// A member that reads one partition, acks what it gets, and opens again, until told to stop.
async fn member(
    client: Client,
    (subscription, topic, partition): (String, String, u32),
    name: String,
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
) {
    while !stop.load(Ordering::Relaxed) {
        let Ok(mut pull) = Pull::open(&client, &subscription, &topic, partition, &name, 200).await else {
            let _ = client.refresh().await;
            continue;
        };
        let mut held_up = HashMap::new();
        loop {
            let next = tokio::time::timeout(Duration::from_millis(100), pull.next()).await;
            if stop.load(Ordering::Relaxed) {
                return;
            }
            match next {
                Ok(Ok(Some(messages))) => {
                    let (done, refused) = work(&messages, &mut seen.lock().unwrap(), &mut held_up);
                    for offset in refused {
                        let _ = pull.nack(offset, Some(Duration::from_millis(20))).await;
                    }
                    let _ = pull.ack_all(&done).await;
                }
                Ok(Ok(None)) | Ok(Err(_)) => break,
                Err(_) => {}
            }
        }
        let _ = client.refresh().await;
    }
}

/// Members that come and go, and leaders that are killed, while messages are worked off.
async fn work_off(mode: SubscriptionMode, kills: usize) -> Seen {
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 2, 3).await;
    make_subscription(&client, "s", "t", mode).await;
    let count = 20_000;
    let publishing = tokio::spawn({
        let client = client.clone();
        async move { publish(&client, "t", 50, count).await }
    });
    let seen: Arc<Mutex<Seen>> = Arc::default();
    let mut members: Vec<(Arc<AtomicBool>, Vec<tokio::task::JoinHandle<()>>)> = Vec::new();
    let begin = |at: usize| {
        let stop: Arc<AtomicBool> = Arc::default();
        let one = |partition| {
            let place = ("s".to_owned(), "t".to_owned(), partition);
            tokio::spawn(member(client.clone(), place, format!("m{at}"), seen.clone(), stop.clone()))
        };
        let tasks = (0..2).map(one).collect();
        (stop, tasks)
    };
    for at in 0..3 {
        members.push(begin(at));
    }
    let begun = Instant::now();
    let mut killed = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        if killed < kills && begun.elapsed() > Duration::from_secs(3 * killed as u64 + 1) {
            cluster.kill(["weir-0", "weir-1", "weir-2"][killed % 3]);
            killed += 1;
        }
        // one goes, another comes
        let (stop, tasks) = members.remove(0);
        stop.store(true, Ordering::Relaxed);
        for task in tasks {
            let _ = task.await;
        }
        members.push(begin(members.len() + begun.elapsed().as_millis() as usize));
        let all = seen.lock().unwrap().messages.len() as u64 == count;
        if all && killed == kills && backlog(&client, "s", &["t"]).await == 0 {
            break;
        }
        let delivered = seen.lock().unwrap().messages.len();
        assert!(begun.elapsed() < 2 * PATIENCE, "{delivered} of {count} delivered");
    }
    publishing.await.unwrap();
    for (stop, tasks) in members {
        stop.store(true, Ordering::Relaxed);
        for task in tasks {
            let _ = task.await;
        }
    }
    let seen = std::mem::take(&mut *seen.lock().unwrap());
    let again = seen.messages.values().filter(|c| **c > 1).count();
    assert!(again >= 200, "what was refused comes again: {again}");
    assert_eq!(seen.order.values().map(Vec::len).sum::<usize>() as u64, count, "each is done");
    println!(
        "{mode:?}: {count} messages worked off over {kills} kills in {:.1} s, {again} came more than once",
        begun.elapsed().as_secs_f64()
    );
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_members_that_come_and_go_get_every_message_while_leaders_are_killed() {
    work_off(SubscriptionMode::Shared, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keys_order_holds_while_members_come_and_go_and_leaders_are_killed() {
    let seen = work_off(SubscriptionMode::KeyShared, 2).await;
    for (key, numbers) in &seen.order {
        assert!(numbers.is_sorted(), "key {key}: {numbers:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_takes_over_in_order() {
    let seen = work_off(SubscriptionMode::Failover, 1).await;
    for (key, numbers) in &seen.order {
        assert!(numbers.is_sorted(), "key {key}: {numbers:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_are_taken_refused_extended_and_acknowledged_one_call_at_a_time() {
    let cluster = Cluster::start(1);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 1, 1).await;
    make_subscription(&client, "s", "t", SubscriptionMode::Shared).await;
    publish(&client, "t", 1, 5).await;
    let mut subscriber = v1::subscriber_client::SubscriberClient::new(client.channel(&cluster.servers).unwrap());
    let pull = |max: u32, wait_ms: u32| v1::PullMessagesRequest {
        subscription: "s".into(),
        messages_max: Some(max),
        wait_ms,
        ..Default::default()
    };
    let offsets = |r: tonic::Response<v1::PullMessagesResponse>| -> Vec<(u64, u32)> {
        r.into_inner().messages.iter().map(|m| (m.offset, m.delivery)).collect()
    };
    assert_eq!(offsets(subscriber.pull(pull(3, 30_000)).await.unwrap()), [(0, 1), (1, 1), (2, 1)]);
    let nacked = v1::Nacked { start: 1, end: 2, delay_ms: Some(5_000), uncounted: false };
    let nack = v1::NackRequest { subscription: "s".into(), partition: 0, offsets: vec![nacked], ..Default::default() };
    subscriber.nack(nack).await.unwrap();
    let acknowledge = |start, end| v1::AcknowledgeRequest {
        subscription: "s".into(),
        partition: 0,
        offsets: vec![v1::OffsetRange { start, end }],
        ..Default::default()
    };
    let acknowledged = subscriber.acknowledge(acknowledge(0, 1)).await.unwrap().into_inner().acknowledged;
    assert_eq!(acknowledged, 1);
    assert_eq!(offsets(subscriber.pull(pull(10, 30_000)).await.unwrap()), [(3, 1), (4, 1)]);
    assert_eq!(offsets(subscriber.pull(pull(10, 0)).await.unwrap()), []);
    assert_eq!(offsets(subscriber.pull(pull(10, 30_000)).await.unwrap()), [(1, 2)], "the refused one, again");
    // what was never delivered cannot be acknowledged
    assert_eq!(subscriber.acknowledge(acknowledge(0, 100)).await.unwrap().into_inner().acknowledged, 4);
    publish(&client, "t", 1, 1).await;
    assert_eq!(offsets(subscriber.pull(pull(10, 30_000)).await.unwrap()), [(5, 1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn large_messages_get_through_to_a_member_with_much_credit() {
    let cluster = Cluster::start(1);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 1, 1).await;
    make_subscription(&client, "s", "t", SubscriptionMode::Shared).await;
    let producer = Producer::open(&client, "t", Options::default()).await.unwrap();
    const COUNT: u64 = 400;
    let mut under_way = Vec::new();
    for _ in 0..COUNT {
        let record = Record { value: Some(vec![7; 100 << 10].into()), ..Default::default() };
        under_way.push(producer.send(record).await.unwrap());
    }
    for outcome in under_way {
        outcome.await.unwrap();
    }
    let mut pull = Pull::open(&client, "s", "t", 0, "m", 10_000).await.unwrap();
    let (mut seen, begun) = (std::collections::BTreeSet::new(), Instant::now());
    while seen.len() < COUNT as usize {
        assert!(begun.elapsed() < PATIENCE, "{} of {COUNT}", seen.len());
        let messages = pull.next().await.unwrap().expect("the stream goes on");
        tokio::time::sleep(Duration::from_millis(2)).await; // slower than the broker
        seen.extend(messages.iter().map(|m| m.offset));
        pull.ack_all(&messages).await.unwrap();
    }
    // one call takes what fits, and the rest with the next
    let mut subscriber = v1::subscriber_client::SubscriberClient::new(client.channel(&cluster.servers).unwrap());
    make_subscription(&client, "calls", "t", SubscriptionMode::Shared).await;
    let request = v1::PullMessagesRequest { subscription: "calls".into(), wait_ms: 30_000, ..Default::default() };
    for _ in 0..3 {
        let got = subscriber.pull(request.clone()).await.unwrap().into_inner().messages.len();
        assert!((1..=31).contains(&got), "{got}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seek_back_brings_everything_again_though_a_member_goes_on_acking() {
    let cluster = Cluster::start(1);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 1, 1).await;
    make_subscription(&client, "s", "t", SubscriptionMode::Exclusive).await;
    const COUNT: u64 = 20_000;
    publish(&client, "t", 5, COUNT).await;
    let mut subscriber = v1::subscriber_client::SubscriberClient::new(client.channel(&cluster.servers).unwrap());
    let (mut delivered, mut sought, mut after) = (0, false, std::collections::BTreeSet::new());
    let begun = Instant::now();
    while after.len() < COUNT as usize {
        assert!(begun.elapsed() < PATIENCE, "{} of {COUNT} after the seek", after.len());
        let mut pull = Pull::open(&client, "s", "t", 0, "m", 500).await.unwrap();
        while let Ok(Some(messages)) = pull.next().await {
            delivered += messages.len() as u64;
            let seek = !sought && delivered > COUNT / 2;
            if seek {
                // acks are on their way while the position moves
                let _ = pull.ack_all(&messages).await;
                let to = Some(v1::seek_request::To::Earliest(true));
                subscriber
                    .seek(v1::SeekRequest { subscription: "s".into(), partition: 0, to, ..Default::default() })
                    .await
                    .unwrap();
                sought = true;
                break;
            }
            if sought {
                after.extend(messages.iter().map(|m| m.offset));
            }
            let _ = pull.ack_all(&messages).await;
            if after.len() == COUNT as usize {
                break;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seek_without_a_place_is_refused_and_the_first_moment_of_all_is_a_place() {
    use v1::seek_request::To;
    let (cluster, client) = start(1).await;
    make_subscription(&client, "s", "t", SubscriptionMode::Shared).await;
    publish(&client, "t", 1, 5).await;
    let mut subscriber = v1::subscriber_client::SubscriberClient::new(client.channel(&cluster.servers).unwrap());
    // nothing is acknowledged: what is not left lies before it
    let position = async || 5 - backlog(&client, "s", &["t"]).await;
    let seek = |to| v1::SeekRequest { subscription: "s".into(), to, ..Default::default() };
    assert_eq!(subscriber.seek(seek(Some(To::Offset(3)))).await.unwrap().into_inner().offset, Some(3));
    for nowhere in [None, Some(To::Earliest(false)), Some(To::Latest(false))] {
        let refused = subscriber.seek(seek(nowhere.clone())).await.expect_err("nobody said where to");
        assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{nowhere:?}");
        assert!(refused.message().starts_with("to must say where"), "{nowhere:?}: {}", refused.message());
    }
    assert_eq!(position().await, 3, "a seek that was refused moves nothing");
    assert_eq!(subscriber.seek(seek(Some(To::TimeMs(0)))).await.unwrap().into_inner().offset, Some(0));
    subscriber.seek(seek(Some(To::Latest(true)))).await.unwrap();
    const FIRST: &str = "1970-01-01T00:00:00Z";
    weir(&cluster, &["subscription", "seek", "s", "--to", FIRST]);
    assert_eq!(position().await, 0);
    // one that began at the end would print what is published while it runs
    let mut consume = std::process::Command::new(WEIR);
    consume.args(["consume", "--topic", "t", "--from", FIRST, "--max", "1", "-o", "json"]);
    let consume = consume.env("WEIR_SERVER", &cluster.servers).stdout(std::process::Stdio::piped());
    let mut consume = consume.spawn().unwrap();
    while consume.try_wait().unwrap().is_none() {
        publish(&client, "t", 1, 1).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let printed: serde_json::Value = serde_json::from_slice(&consume.wait_with_output().unwrap().stdout).unwrap();
    assert_eq!(printed["offset"], 0, "{printed}");
}
