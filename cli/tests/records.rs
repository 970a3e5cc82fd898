//! What a record may hold, whole and through every reader: legal records of Kafka are carried as they are, and batches whose records cannot
//! be decoded are passed over by all readers alike.

mod cluster;

use bytes::Bytes;
use cluster::power::Power;
use cluster::{
    Cluster, PATIENCE, WEIR, delete_subscription, make_topic, make_topic_of, read_all, refreshed, spec, start,
    subscribe, until, until_is,
};
use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};
use weir_client::consumer::Message;
use weir_client::producer::{Options, Producer};
use weir_client::schedule::{cancel, schedule};
use weir_client::subscriber::Subscriber;
use weir_client::{Client, Compression, Record, proto as v1};
use weir_proto::records::{Stamp, encode, of_encoded};

/// What is due then is so once the brokers' clock has been moved, however long it takes to schedule it.
const DAY: Duration = Duration::from_secs(86_400);

fn text(value: &str) -> Record {
    Record { value: Some(value.to_owned().into()), timestamp_ms: 1_700_000_000_000, ..Default::default() }
}

/// A record of everything that Kafka allows in one.
fn legal() -> Record {
    let header = |name: &str, value: Option<&'static [u8]>| (name.to_owned(), value.map(Bytes::from_static));
    Record {
        key: Some(Bytes::from_static(b"\x00\xff\xfe key")),
        value: Some(Bytes::from_static(b"\xc3\x28 not UTF-8")),
        headers: vec![
            header("twice", Some(b"first")),
            header("", Some(b"a name may be empty")),
            header("null", None),
            header("empty", Some(b"")),
            header("twice", Some(b"\xff\x00")),
        ],
        timestamp_ms: 1_700_000_000_123,
    }
}

/// Batches that brokers store, for their headers are right, and whose records cannot be decoded.
fn unreadable() -> Vec<(&'static str, Bytes)> {
    let whole = one(text("cut off in the middle of its value"));
    let alone = one(text("alone, and long enough for two"));
    let plain = |count, records: &[u8]| of_encoded(records, Compression::None, count).unwrap();
    vec![
        ("bytes that are no records", plain(3, &[0xff; 60])),
        ("a record that is cut off", plain(1, &whole[61..whole.len() - 9])),
        ("compressed by nobody", of_encoded(b"this is not gzip", Compression::Gzip, 2).unwrap()),
        // length, attributes, time, offset, no key, no value, one header: a name of one byte that is not UTF-8, no value
        ("a header's name that is not UTF-8", plain(1, &[18, 0, 0, 0, 1, 1, 2, 2, 0xff, 1])),
        ("fewer records than it says", plain(2, &alone[61..])),
    ]
}

/// Publishes batches as they are, in order.
async fn publish(client: &Client, topic: &str, batches: Vec<Bytes>) {
    for batch in batches {
        send(client, topic, batch).await.expect("the header and the checksum are right");
    }
}

/// Publishes a batch as it is, at the leader, which is asked for again where it has changed.
async fn send(client: &Client, topic: &str, batch: Bytes) -> Result<u64, v1::Error> {
    let end = Instant::now() + PATIENCE;
    loop {
        let leader = refreshed(client).await.leader(topic, 0).expect("known since the topic was made");
        let mut publisher = v1::publisher_client::PublisherClient::new(client.channel(&leader).unwrap());
        let batch = batch.clone();
        let batch = v1::PublishBatch { id: 1, topic: topic.to_owned(), partition: 0, batch, ..Default::default() };
        let mut acks = publisher.publish_stream(futures::stream::iter([batch])).await.unwrap().into_inner();
        match acks.message().await.unwrap().unwrap().outcome.unwrap() {
            v1::publish_ack::Outcome::BaseOffset(offset) => return Ok(offset),
            v1::publish_ack::Outcome::Error(error) if error.reason == "NOT_LEADER" && Instant::now() < end => {}
            v1::publish_ack::Outcome::Error(error) => return Err(error),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn one(record: Record) -> Bytes {
    encode(&[record], Compression::None, None).unwrap()
}

async fn next(subscriber: &mut Subscriber, what: &str) -> weir_client::subscriber::Delivered {
    let next = tokio::time::timeout(PATIENCE, subscriber.next()).await;
    next.unwrap_or_else(|_| panic!("{what}: nothing comes")).expect(what).expect(what)
}

/// Of a subscription to `t`.
async fn backlog(client: &Client, subscription: &str) -> u64 {
    cluster::backlog(client, subscription, &["t"]).await
}

/// The internal topic that holds what is scheduled for `t`, and the subscription with its position.
async fn schedule_of_t(client: &Client) -> String {
    let cluster = refreshed(client).await;
    let schedule = cluster.metadata.topics.iter().find(|t| t.scheduled_for == "default/t");
    schedule.expect("something was scheduled").name.clone()
}

async fn metric(cluster: &Cluster, name: &str) -> u64 {
    let text = cluster.metrics(0).await;
    let line = text.lines().find(|line| line.starts_with(name));
    line.map_or(0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_that_cannot_be_decoded_are_passed_over_by_every_reader_and_block_none() {
    let (cluster, client) = start(1).await;
    let bad = unreadable();
    let mut batches = vec![one(text("first"))];
    batches.extend(bad.iter().map(|(_, batch)| batch.clone()));
    batches.push(one(legal()));
    batches.push(one(text("last")));
    publish(&client, "t", batches).await;
    let wanted = [text("first"), legal(), text("last")];

    let read: Vec<Record> = read_all(&client, "t", 1).await.into_iter().map(|m| m.record).collect();
    assert_eq!(read, wanted, "by offset");
    // and the command line says which offsets are missing from what it prints
    let consume = |output: &str| {
        let arguments = ["consume", "--topic", "t", "--from", "earliest", "--max", "3", "-o", output];
        let printed = Command::new(WEIR).args(["--server", &cluster.servers]).args(arguments).output();
        let printed = printed.unwrap();
        assert!(printed.status.success());
        let lines = |bytes: &[u8]| String::from_utf8_lossy(bytes).lines().map(str::to_owned).collect::<Vec<_>>();
        (lines(&printed.stdout), lines(&printed.stderr))
    };
    let (printed, said) = consume("text");
    assert_eq!((printed.len(), said.len()), (3, bad.len()), "{said:?}");
    assert!(said[0].starts_with("weir: default/t/0: offsets 1 to 3 were passed over: "), "{}", said[0]);
    let (printed, said) = consume("json");
    let said: Vec<serde_json::Value> = said.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((printed.len(), said.len()), (3, bad.len()));
    let offset = |at: usize, name: &str| said[at]["passedOver"][name].as_u64().unwrap();
    for at in 0..bad.len() {
        let before = if at == 0 { 0 } else { offset(at - 1, "lastOffset") };
        assert_eq!(offset(at, "firstOffset"), before + 1, "every offset between is named");
    }

    let modes = [
        v1::SubscriptionMode::Exclusive,
        v1::SubscriptionMode::Failover,
        v1::SubscriptionMode::Shared,
        v1::SubscriptionMode::KeyShared,
    ];
    let mut found = 0;
    for mode in modes {
        for filter in ["", "size > 0"] {
            let name = format!("s-{}-{}", mode as i32, filter.len());
            let wanted_spec = v1::SubscriptionSpec { filter: filter.into(), ..spec("t", mode) };
            subscribe(&client, &name, wanted_spec).await.unwrap();
            let mut subscriber = Subscriber::open(&client, &name, Default::default()).await.unwrap();
            for wanted in &wanted {
                let delivered = next(&mut subscriber, &name).await;
                assert_eq!(delivered.message.record, *wanted, "{name}");
                delivered.ack();
            }
            until_is(&name, 0, async || backlog(&client, &name).await).await;
            subscriber.close().await;
            found += bad.len() as u64;
            let counted = metric(&cluster, "weir_undecodable_batches_total{outcome=\"skipped\"}").await;
            assert_eq!(counted, found, "each batch is counted once for each subscription ({name})");
        }
    }
    // one call after the other, in a mode of whole batches, for one message each
    subscribe(&client, "pulled", spec("t", v1::SubscriptionMode::Exclusive)).await.unwrap();
    let leader = client.cluster().leader("t", 0).unwrap();
    let mut calls = v1::subscriber_client::SubscriberClient::new(client.channel(&leader).unwrap());
    for wanted in &wanted {
        let pull = v1::PullMessagesRequest {
            subscription: "pulled".into(),
            partition: Some(0),
            member: "m".into(),
            messages_max: Some(1),
            wait_ms: 30_000,
            ..Default::default()
        };
        let mut messages = calls.pull(pull).await.unwrap().into_inner().messages;
        assert_eq!(messages.len(), 1);
        let message = messages.remove(0);
        assert_eq!(Record::from(message.message.unwrap()), *wanted);
        let offsets = vec![v1::OffsetRange { start: message.offset, end: message.offset + 1 }];
        let done = v1::AcknowledgeRequest { subscription: "pulled".into(), offsets, ..Default::default() };
        assert_eq!(calls.acknowledge(done).await.unwrap().into_inner().acknowledged, 1);
    }
    let counted = metric(&cluster, "weir_undecodable_batches_total{outcome=\"skipped\"}").await;
    assert_eq!(counted, found + bad.len() as u64, "once each, though their records were leased one by one");
    // a stream of messages one by one, in a mode of whole batches: what is passed over takes no credit
    subscribe(&client, "streamed", spec("t", v1::SubscriptionMode::Failover)).await.unwrap();
    let (requests, receiver) = tokio::sync::mpsc::channel(16);
    let open = v1::PullOpen {
        subscription: "streamed".into(),
        partition: 0,
        member: "m".into(),
        messages: true,
        ..Default::default()
    };
    let first = v1::PullRequest { open: Some(open), credit_messages: 1, ..Default::default() };
    requests.send(first).await.unwrap();
    let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut responses = calls.streaming_pull(stream).await.unwrap().into_inner();
    for wanted in &wanted {
        let mut response = tokio::time::timeout(PATIENCE, responses.message()).await.expect("a message");
        let message = response.as_mut().unwrap().as_mut().unwrap().messages.remove(0);
        assert_eq!(Record::from(message.message.unwrap()), *wanted);
        let acks = vec![v1::OffsetRange { start: message.offset, end: message.offset + 1 }];
        let done = v1::PullRequest { acks, credit_messages: 1, ..Default::default() };
        requests.send(done).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_that_cannot_be_decoded_are_moved_unchanged_to_the_dead_letter_topic() {
    let (cluster, client) = start(1).await;
    let bad = unreadable();
    let mut batches = vec![one(text("first"))];
    batches.extend(bad.iter().map(|(_, batch)| batch.clone()));
    batches.push(one(text("last")));
    publish(&client, "t", batches).await;
    // the dead-letter topic does not exist yet: nothing is held up, and nothing is lost
    let wanted = v1::SubscriptionSpec {
        deliveries_max: Some(5),
        dead_letter_topic: "dead".into(),
        ..spec("t", v1::SubscriptionMode::Exclusive)
    };
    subscribe(&client, "s", wanted).await.unwrap();
    let mut subscriber = Subscriber::open(&client, "s", Default::default()).await.unwrap();
    for wanted in ["first", "last"] {
        let delivered = next(&mut subscriber, wanted).await;
        assert_eq!(delivered.message.record, text(wanted));
        delivered.ack();
    }
    let offsets: u64 = 3 + 1 + 2 + 1 + 2;
    until_is("what was not moved is not acknowledged", offsets, async || backlog(&client, "s").await).await;
    // however little it takes from clients
    let small = v1::TopicSpec { partitions: 1, replicas: 1, message_bytes_max: Some(70), ..Default::default() };
    make_topic_of(&client, "dead", small).await;
    until_is("all are moved", 0, async || backlog(&client, "s").await).await;
    let dead = read_all(&client, "dead", 1).await;
    let moved: BTreeSet<Bytes> = dead.iter().map(|m| m.record.value.clone().unwrap()).collect();
    assert_eq!(dead.len(), bad.len());
    assert_eq!(moved, bad.iter().map(|(_, batch)| batch.clone()).collect(), "byte for byte");
    let header = |m: &Message, name: &str| String::from_utf8(m.record.header(name).unwrap().to_vec()).unwrap();
    let mut places: Vec<u64> = dead.iter().map(|m| header(m, "weir-dead-offset").parse().unwrap()).collect();
    places.sort_unstable();
    assert_eq!(places, [1, 4, 5, 7, 8]);
    assert!(dead.iter().all(|m| header(m, "weir-dead-subscription") == "default/s"));
    // they would be the same again: they stay, and that is said
    let output = Command::new(WEIR)
        .args(["subscription", "redrive", "s"])
        .env("WEIR_SERVER", &cluster.servers)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("cannot be decoded"), "{output:?}");
    assert_eq!(said.matches("left where it is").count(), bad.len(), "{said}");
    subscriber.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_moved_whole_and_put_back_whole_whatever_their_compression_was() {
    let (cluster, client) = start(3).await;
    make_topic(&client, "dead", 1, 3).await;
    let wanted = v1::SubscriptionSpec {
        deliveries_max: Some(1),
        dead_letter_topic: "dead".into(),
        ..spec("t", v1::SubscriptionMode::Shared)
    };
    subscribe(&client, "s", wanted.clone()).await.unwrap();
    // as large as the topic takes, and one that is ten times as large before it is compressed
    let large = Record { value: Some(vec![7; 1_048_450].into()), ..Default::default() };
    let folded = Record { value: Some(vec![8; 10 << 20].into()), ..legal() };
    let tombstone = Record { value: None, ..legal() };
    let records = [large, folded.clone(), legal(), tombstone];
    publish(&client, "t", vec![one(records[0].clone())]).await;
    publish(&client, "t", vec![encode(&[folded], Compression::Gzip, None).unwrap()]).await;
    publish(&client, "t", records[2..].iter().cloned().map(one).collect()).await;
    let mut subscriber = Subscriber::open(&client, "s", Default::default()).await.unwrap();
    for _ in &records {
        next(&mut subscriber, "the message").await.nack(None);
    }
    until_is("all are dead", 4, async || read_all(&client, "dead", 1).await.len()).await;
    let plain = |record: &Record| {
        let mut record = record.clone();
        record.headers.retain(|(name, _)| !name.starts_with("weir-dead-") && name != "weir-only-for");
        record
    };
    let dead = read_all(&client, "dead", 1).await;
    let same = |found: Vec<Record>| {
        assert_eq!(found.len(), records.len());
        for record in &records {
            let length = record.value.as_ref().map_or(0, Bytes::len);
            assert!(found.iter().any(|found| plain(found) == *record), "a value of {length} bytes is not whole");
        }
    };
    same(dead.into_iter().map(|m| m.record).collect());
    // the subscription may have changed since: what is put back is moved by the brokers
    let output = cluster::weir(&cluster, &["subscription", "redrive", "s"]);
    assert_eq!(output, "4 dead letters of s were put back\n");
    let mut back = Vec::new();
    for _ in &records {
        let delivered = next(&mut subscriber, "what was put back").await;
        assert_eq!(delivered.message.record.header("weir-only-for").unwrap(), "default/s");
        assert!(delivered.message.record.headers.iter().all(|(name, _)| !name.starts_with("weir-dead-")));
        back.push(delivered.message.record.clone());
        delivered.ack();
    }
    same(back);
    assert_eq!(cluster::weir(&cluster, &["subscription", "redrive", "s"]), "0 dead letters of s were put back\n");
    subscriber.close().await;
    // what put them back is deleted with its subscription
    delete_subscription(&client, "s").await;
    until_is("no subscription is left", 0, async || refreshed(&client).await.metadata.subscriptions.len()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_scheduled_message_is_lost_however_large_its_headers_are_and_whatever_its_topic_takes_later() {
    let power = Power::new();
    let (_cluster, client, _) = power.start();
    make_topic(&client, "t", 1, 3).await;
    let at = SystemTime::now() + DAY;
    let record = |number: u32| Record {
        value: Some(Bytes::from_static(b"x")),
        headers: vec![
            ("number".to_owned(), Some(number.to_string().into())),
            ("large".to_owned(), Some(vec![b'h'; 4 << 10].into())),
            ("large".to_owned(), None),
        ],
        ..Default::default()
    };
    for from in (0..1_000).step_by(200) {
        schedule(&client, "t", (from..from + 200).map(|number| (record(number), at)).collect()).await.unwrap();
    }
    let large = Record { value: Some(vec![1; 900_000].into()), ..Default::default() };
    schedule(&client, "t", vec![(large.clone(), at)]).await.unwrap();
    let small = v1::TopicSpec { partitions: 1, replicas: 3, message_bytes_max: Some(64 << 10), ..Default::default() };
    make_topic_of(&client, "t", small).await;
    let too_late = schedule(&client, "t", vec![(large.clone(), at)]).await;
    assert!(too_late.is_err(), "more than the topic takes now is refused when it is scheduled");
    power.jump(DAY.as_secs() as i64 + 60);
    until_is("all are published", 1_001, async || read_all(&client, "t", 1).await.len()).await;
    let mut numbers = BTreeSet::new();
    for message in read_all(&client, "t", 1).await {
        let mut found = message.record;
        found.headers.retain(|(name, _)| name != "weir-deliver-at");
        match found.header("number").map(|n| std::str::from_utf8(n).unwrap().parse().unwrap()) {
            Some(number) => {
                let wanted = record(number);
                assert_eq!((&found.value, &found.headers), (&wanted.value, &wanted.headers));
                assert!(numbers.insert(number));
            }
            None => assert_eq!(found.value, large.value),
        }
    }
    assert_eq!(numbers.len(), 1_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_scheduled_and_published_takes_no_disk_any_more() {
    let (_cluster, client) = start(1).await;
    let now = SystemTime::now();
    // due much later, it keeps nothing that is scheduled after it
    let later = schedule(&client, "t", vec![(legal(), now + DAY)]).await.unwrap().remove(0);
    // more than two checkpoints apart
    for _ in 0..70 {
        let record = Record { value: Some(vec![1; 900_000].into()), ..Default::default() };
        schedule(&client, "t", vec![(record, now)]).await.unwrap();
    }
    until("the log of what was scheduled is cut", async || {
        let statuses = client.describe(&[schedule_of_t(&client).await]).await.map_err(|e| e.to_string())?;
        match statuses.first().map_or(0, |p| p.start_offset) {
            0 => Err(format!("{statuses:?}")),
            _ => Ok(()),
        }
    })
    .await;
    until_is("all are published", 70, async || read_all(&client, "t", 1).await.len()).await;
    // it is still there, under the place that it was given
    cancel(&client, &later).await.unwrap();
    assert!(cancel(&client, &later).await.is_err(), "twice");
    let schedule = schedule_of_t(&client).await;
    until_is("nothing is scheduled any more", 0, async || cluster::backlog(&client, &schedule, &[&schedule]).await)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn scheduled_messages_that_were_written_again_are_published_once_and_whole() {
    let power = Power::new();
    let (cluster, client, _) = power.start();
    make_topic(&client, "t", 1, 3).await;
    let now = SystemTime::now();
    schedule(&client, "t", (0..50).map(|_| (legal(), now + DAY)).collect()).await.unwrap();
    let large = Record { value: Some(vec![1; 900_000].into()), ..Default::default() };
    for _ in 0..70 {
        schedule(&client, "t", vec![(large.clone(), now)]).await.unwrap();
    }
    until("they are written again", async || {
        let statuses = client.describe(&[schedule_of_t(&client).await]).await.map_err(|e| e.to_string())?;
        match statuses.first().map_or(0, |p| p.high_watermark) {
            170 => Ok(()),
            _ => Err(format!("{statuses:?}")),
        }
    })
    .await;
    cluster.kill("weir-0");
    cluster.kill("weir-1");
    power.jump(DAY.as_secs() as i64 + 60);
    until_is("all are published", 120, async || read_all(&client, "t", 1).await.len()).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let found = read_all(&client, "t", 1).await;
    assert_eq!(found.len(), 120, "each once");
    let small = found.into_iter().map(|m| m.record).filter(|record| record.key.is_some());
    for mut record in small {
        record.headers.retain(|(name, _)| name != "weir-deliver-at");
        assert_eq!(record, legal());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn producer_ids_of_brokers_are_taken_from_no_client() {
    let (_cluster, client) = start(1).await;
    for id in [1i64 << 62, i64::MAX] {
        let stamp = Stamp { id, epoch: 0, sequence: 0 };
        let refused = send(&client, "t", encode(&[text("forged")], Compression::None, Some(stamp)).unwrap()).await;
        let error = refused.expect_err("it was taken");
        assert_eq!((error.code, error.reason.as_str()), (tonic::Code::PermissionDenied as i32, "PRODUCER"));
    }
    let stamp = Stamp { id: (1 << 62) - 1, epoch: 0, sequence: 0 };
    send(&client, "t", encode(&[text("the last id of clients")], Compression::None, Some(stamp)).unwrap())
        .await
        .unwrap();
    assert_eq!(read_all(&client, "t", 1).await.len(), 1);
    let producer = Producer::open(&client, "t", Options::default()).await.unwrap();
    producer.send(legal()).await.unwrap().await.unwrap();
}
