//! Names and ids: what brokers keep for themselves is out of clients' reach, and a topic that is re-created under its name is another
//! one for whoever knew the first.

mod cluster;

use cluster::{
    Cluster, PATIENCE, change, delete_subscription, delete_topic, make_topic, read_all, refreshed, spec, start,
    subscribe, until, weir,
};
use std::time::{Duration, Instant, SystemTime};
use tonic::Code;
use weir_client::consumer::{From, read_partition};
use weir_client::producer::{Options, Producer};
use weir_client::schedule::{cancel, schedule};
use weir_client::subscriber::Subscriber;
use weir_client::{Client, Error, Record};
use weir_proto::v1;
use weir_proto::v1::publisher_client::PublisherClient;
use weir_proto::v1::subscriber_client::SubscriberClient;

fn record(value: &str) -> Record {
    Record { value: Some(value.to_owned().into()), ..Default::default() }
}

async fn publish(client: &Client, topic: &str, values: &[&str]) {
    let producer = Producer::open(client, topic, Options::default()).await.unwrap();
    for value in values {
        producer.send_to(0, record(value)).await.unwrap().await.unwrap();
    }
}

async fn values(client: &Client, topic: &str) -> Vec<String> {
    let all = read_all(client, topic, 1).await;
    all.iter().map(|m| String::from_utf8_lossy(m.record.value.as_deref().unwrap_or_default()).into_owned()).collect()
}

async fn recreate(client: &Client, name: &str) -> (u64, u64) {
    let id = |client: &Client| client.cluster().topic(name).map_or(0, |t| t.id);
    let before = id(client);
    delete_topic(client, name).await;
    make_topic(client, name, 1, 1).await;
    (before, id(client))
}

fn reason(error: Error) -> String {
    match error {
        Error::Refused { reason, .. } => reason,
        other => panic!("{other}"),
    }
}

fn soon() -> SystemTime {
    SystemTime::now() + Duration::from_millis(300)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_of_a_user_is_its_own_whatever_its_name_ends_with() {
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    let longest = "x".repeat(253);
    for name in ["jobs", "jobs.scheduled", &longest] {
        make_topic(&client, name, 1, 3).await;
    }
    for name in ["s", "s.redrive"] {
        subscribe(&client, name, spec("jobs.scheduled", v1::SubscriptionMode::Shared)).await.unwrap();
    }
    publish(&client, "jobs.scheduled", &["mine"]).await;
    for topic in ["jobs", &longest] {
        schedule(&client, topic, vec![(record("later"), soon())]).await.unwrap();
    }
    for topic in ["jobs", &longest] {
        until("what was scheduled comes", async || {
            let seen = values(&client, topic).await;
            if seen == ["later"] { Ok(()) } else { Err(seen) }
        })
        .await;
    }
    assert_eq!(values(&client, "jobs.scheduled").await, ["mine"], "nothing of it was taken for a scheduled message");
    let scheduled = schedule(&client, "jobs.scheduled", vec![(record("far"), SystemTime::now() + PATIENCE * 60)]).await;
    cancel(&client, &scheduled.unwrap()[0]).await.unwrap();
    // a topic that is changed keeps what is scheduled for it, and what comes later finds its new partitions
    let far = schedule(&client, "jobs", vec![(record("far"), SystemTime::now() + PATIENCE * 60)]).await.unwrap();
    make_topic(&client, "jobs", 3, 3).await;
    let keyed = (0..12).map(|n| (Record { key: Some(format!("{n}").into()), ..record("keyed") }, soon())).collect();
    schedule(&client, "jobs", keyed).await.unwrap();
    until("all come", async || {
        let seen = read_all(&client, "jobs", 3).await;
        let partitions: std::collections::BTreeSet<u32> = seen.iter().map(|m| m.partition).collect();
        if seen.len() == 13 && partitions.len() == 3 { Ok(()) } else { Err((seen.len(), partitions)) }
    })
    .await;
    cancel(&client, &far[0]).await.unwrap();
    // tools hide what is internal unless they are asked for all
    weir(&cluster, &["subscription", "snapshot", "s", "before"]);
    for list in [&["topic", "list"][..], &["subscription", "list"][..]] {
        assert!(!weir(&cluster, list).contains("weir-system"), "{list:?}");
        assert!(weir(&cluster, &[list, &["--all"]].concat()).contains("weir-system/"), "{list:?}");
    }
    for broker in 0..3 {
        let metrics = cluster.metrics(broker).await;
        assert!(!metrics.contains("weir-system") && metrics.contains("weir_partitions_led"), "{metrics}");
    }
    delete_topic(&client, "jobs").await;
    // (any broker is asked, which may hear of it a moment later)
    until("its schedule goes with it", async || {
        let left = weir(&cluster, &["topic", "list", "--all", "-o", "json"]);
        if left.matches("weir-system/scheduled-").count() == 2 { Ok(()) } else { Err(left) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_reaches_what_brokers_keep_for_themselves() {
    let cluster = Cluster::start(1);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 1, 1).await;
    make_topic(&client, "dead", 1, 1).await;
    let with_dead =
        v1::SubscriptionSpec { dead_letter_topic: "dead".into(), ..spec("t", v1::SubscriptionMode::Shared) };
    subscribe(&client, "s", with_dead).await.unwrap();
    schedule(&client, "t", vec![(record("far"), SystemTime::now() + PATIENCE * 60)]).await.unwrap();
    weir(&cluster, &["subscription", "snapshot", "s", "kept"]);
    weir(&cluster, &["subscription", "redrive", "s"]);
    let seen = refreshed(&client).await;
    let topics = seen.metadata.topics.iter().filter(|t| t.internal).map(|t| t.name.clone());
    let subscriptions = seen.metadata.subscriptions.iter().filter(|s| s.internal).map(|s| s.name.clone());
    let (topics, subscriptions): (Vec<_>, Vec<_>) = (topics.collect(), subscriptions.collect());
    assert_eq!((topics.len(), subscriptions.len()), (1, 3), "a schedule with its position, a snapshot, a redrive");
    let mut admin = client.admin().await.unwrap();
    let mut publisher = PublisherClient::new(client.channel(&cluster.servers).unwrap());
    let mut refused = Vec::new();
    for name in topics.iter().chain(&subscriptions).cloned().chain(["weir-system/new".to_owned()]) {
        let topic = v1::TopicSpec { partitions: 1, replicas: 1, ..Default::default() };
        let delete = || v1::DeleteRequest { name: name.clone(), ..Default::default() };
        refused.push(
            admin
                .apply_topic(v1::ApplyTopicRequest { name: name.clone(), spec: Some(topic), ..Default::default() })
                .await
                .err(),
        );
        refused.push(admin.delete_topic(delete()).await.err());
        refused.push(admin.delete_subscription(delete()).await.err());
        for (own, reads, dead) in [
            (name.as_str(), "t", ""),
            ("mine", name.as_str(), ""),
            ("mine", "weir-system/#", ""),
            ("mine", "t", name.as_str()),
        ] {
            let spec =
                v1::SubscriptionSpec { topic: reads.into(), dead_letter_topic: dead.into(), ..Default::default() };
            let request = v1::ApplySubscriptionRequest { name: own.into(), spec: Some(spec), ..Default::default() };
            refused.push(admin.apply_subscription(request).await.err());
        }
        for deliver_at_ms in [None, Some(4_000_000_000_000)] {
            let message = v1::Message { value: Some("x".into()), deliver_at_ms, ..Default::default() };
            let partition = Some(0);
            let request =
                v1::PublishRequest { topic: name.clone(), partition, messages: vec![message], ..Default::default() };
            refused.push(publisher.publish(request).await.err());
        }
    }
    let kept: Vec<String> = refused
        .iter()
        .map(|e| e.as_ref().map_or("taken".to_owned(), |e| format!("{:?}", e.code())))
        .filter(|code| code != "InvalidArgument")
        .collect();
    assert_eq!(kept, [""; 0]);
    // a batch on a stream, too
    let batch = weir_proto::records::encode(&[record("x")], weir_proto::records::Compression::None, None).unwrap();
    let batch = v1::PublishBatch { id: 1, topic: topics[0].clone(), batch, ..Default::default() };
    let mut acks = publisher.publish_stream(tokio_stream::iter([batch])).await.unwrap().into_inner();
    let outcome = acks.message().await.unwrap().unwrap().outcome;
    let Some(v1::publish_ack::Outcome::Error(error)) = outcome else { panic!("{outcome:?}") };
    assert_eq!(error.reason, "INTERNAL");
    // whoever took a schedule's messages would acknowledge what was never published
    let mut puller = SubscriberClient::new(client.channel(&cluster.servers).unwrap());
    for subscription in subscriptions {
        let pull =
            v1::PullMessagesRequest { subscription: subscription.clone(), partition: Some(0), ..Default::default() };
        let pulled = puller.pull(pull).await;
        let is_redrive = subscription.contains("redrive");
        assert_eq!(pulled.err().map(|e| e.code()), (!is_redrive).then_some(Code::InvalidArgument), "{subscription}");
    }
    // every subscription of another's making goes on
    subscribe(&client, "all", spec("#", v1::SubscriptionMode::Shared)).await.unwrap();
    let all = client.cluster().subscription("all").unwrap().topics.clone();
    assert_eq!(all, ["default/dead", "default/t"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_by_offset_is_told_that_its_topic_was_re_created() {
    let cluster = Cluster::start(1);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 1, 1).await;
    publish(&client, "t", &["a", "b"]).await;
    let (sender, mut reader) = tokio::sync::mpsc::channel(16);
    tokio::spawn(read_partition(client.clone(), "t".into(), 0, From::Earliest, false, sender));
    let mut read = Vec::new();
    while read.len() < 2 {
        read.extend(reader.recv().await.unwrap().unwrap());
    }
    let (before, now) = recreate(&client, "t").await;
    assert_ne!(before, now);
    publish(&client, "t", &["c", "d", "e"]).await;
    // it neither goes on at offset 2 of the new topic, which would skip two records, nor waits for ever; it may have looked while there
    // was none
    let ended = tokio::time::timeout(PATIENCE, reader.recv()).await.expect("in time").expect("an error");
    let ended = reason(ended.unwrap_err());
    assert!(["TOPIC_RECREATED", "NO_TOPIC"].contains(&&*ended), "{ended}");
    assert!(reader.recv().await.is_none());
    // so does one that kept its place over a restart, where it kept the id with it
    assert_eq!((read[1].topic_id, read[1].offset), (before, 1));
    let (sender, mut reader) = tokio::sync::mpsc::channel(16);
    let from = From::OffsetOf { topic_id: before, offset: 2 };
    tokio::spawn(read_partition(client.clone(), "t".into(), 0, from, false, sender));
    assert_eq!(reason(reader.recv().await.unwrap().unwrap_err()), "TOPIC_RECREATED");
    let mut log = v1::log_client::LogClient::new(client.channel(&cluster.servers).unwrap());
    for (topic_id, wanted) in [(0, None), (now, None), (before, Some(Code::FailedPrecondition))] {
        let fetch = v1::FetchRequest { topic: "t".into(), topic_id, ..Default::default() };
        let ends = v1::ListOffsetsRequest { topic: "t".into(), topic_id, ..Default::default() };
        let (stream, ends) = (log.fetch_stream(fetch.clone()).await.map(drop), log.list_offsets(ends).await);
        let fetched = log.fetch(fetch).await;
        assert_eq!(stream.err().map(|e| e.code()), wanted);
        assert_eq!(ends.map(|r| r.into_inner().topic_id).map_err(|e| e.code()), wanted.map_or(Ok(now), Err));
        assert_eq!(fetched.map(|r| r.into_inner().topic_id).map_err(|e| e.code()), wanted.map_or(Ok(now), Err));
    }
    assert_eq!(values(&client, "t").await, ["c", "d", "e"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_producer_is_told_that_its_topic_was_re_created_and_goes_on_in_the_new_one() {
    let cluster = Cluster::start(1);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 1, 1).await;
    let producer = Producer::open(&client, "t", Options::default()).await.unwrap();
    let unused = Producer::open(&client, "t", Options::default()).await.unwrap();
    for value in ["a", "b"] {
        producer.send_to(0, record(value)).await.unwrap().await.unwrap();
    }
    recreate(&client, "t").await;
    // its sequences continue those of the topic before
    let refused = producer.send_to(0, record("c")).await.unwrap().await;
    assert_eq!(reason(refused.unwrap_err()), "TOPIC_RECREATED");
    for value in ["d", "e"] {
        producer.send_to(0, record(value)).await.unwrap().await.unwrap();
    }
    unused.send_to(0, record("f")).await.unwrap().await.expect("nothing of it was in the topic before");
    assert_eq!(values(&client, "t").await, ["d", "e", "f"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn acks_seeks_and_cancellations_of_a_topic_that_was_re_created_touch_nothing_of_the_new_one() {
    let cluster = Cluster::start(1);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t.one", 1, 1).await;
    // a subscription by pattern outlives the topic
    subscribe(&client, "s", spec("t.*", v1::SubscriptionMode::Shared)).await.unwrap();
    publish(&client, "t.one", &["old"]).await;
    let mut subscriber = SubscriberClient::new(client.channel(&cluster.servers).unwrap());
    let pull = v1::PullMessagesRequest {
        subscription: "s".into(),
        topic: "t.one".into(),
        partition: Some(0),
        wait_ms: 30_000,
        ..Default::default()
    };
    let old = subscriber.pull(pull.clone()).await.unwrap().into_inner().messages.remove(0);
    let mut reader = Subscriber::open(&client, "s", Default::default()).await.unwrap();
    let far = schedule(&client, "t.one", vec![(record("far"), SystemTime::now() + PATIENCE * 60)]).await.unwrap();
    let (before, now) = recreate(&client, "t.one").await;
    assert_eq!((old.topic_id, far[0].topic_id), (before, before));
    publish(&client, "t.one", &["new"]).await;
    let delivered = tokio::time::timeout(PATIENCE, reader.next()).await.expect("in time").unwrap().unwrap();
    assert_eq!((delivered.message.topic_id, delivered.message.offset), (now, old.offset));
    let offsets = vec![v1::OffsetRange { start: old.offset, end: old.offset + 1 }];
    let stale = v1::AcknowledgeRequest {
        subscription: "s".into(),
        topic: "t.one".into(),
        offsets,
        topic_id: old.topic_id,
        ..Default::default()
    };
    assert_eq!(subscriber.acknowledge(stale.clone()).await.unwrap_err().code(), Code::FailedPrecondition);
    let seek = v1::SeekRequest {
        subscription: "s".into(),
        topic: "t.one".into(),
        topic_id: before,
        to: Some(v1::seek_request::To::Offset(1)),
        ..Default::default()
    };
    assert_eq!(subscriber.seek(seek).await.unwrap_err().code(), Code::FailedPrecondition);
    let again = schedule(&client, "t.one", vec![(record("far"), SystemTime::now() + PATIENCE * 60)]).await.unwrap();
    assert_eq!(again[0].offset, far[0].offset);
    assert_eq!(reason(cancel(&client, &far[0]).await.unwrap_err()), "TOPIC_RECREATED");
    cancel(&client, &again[0]).await.unwrap();
    let acked = subscriber.acknowledge(v1::AcknowledgeRequest { topic_id: now, ..stale }).await.unwrap().into_inner();
    assert_eq!(acked.acknowledged, 1, "it was not acknowledged before");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_subscription_delivered_says_nothing_to_the_one_that_is_made_again_under_its_name() {
    let (cluster, client) = start(1).await;
    make_topic(&client, "results", 1, 1).await;
    subscribe(&client, "s", spec("t", v1::SubscriptionMode::Shared)).await.unwrap();
    publish(&client, "t", &["a", "b"]).await;
    let mut calls = SubscriberClient::new(client.channel(&cluster.servers).unwrap());
    let pull =
        v1::PullMessagesRequest { subscription: "s".into(), partition: Some(0), wait_ms: 30_000, ..Default::default() };
    let mut reader = Subscriber::open(&client, "s", Default::default()).await.unwrap();
    let mut held = Vec::new();
    for _ in 0..2 {
        held.push(tokio::time::timeout(PATIENCE, reader.next()).await.expect("in time").unwrap().unwrap());
    }
    drop(reader);
    let old = calls.pull(pull.clone()).await.unwrap().into_inner().messages.remove(0).subscription_id;
    delete_subscription(&client, "s").await;
    subscribe(&client, "s", spec("t", v1::SubscriptionMode::Shared)).await.unwrap();
    // the new one has delivered both to somebody when the answers of the earlier one's consumers come
    let mut delivered = Vec::new();
    while delivered.len() < 2 {
        delivered.extend(calls.pull(pull.clone()).await.unwrap().into_inner().messages);
    }
    let new = delivered[0].subscription_id;
    assert!(old != 0 && new > old, "{old} {delivered:?}");
    let both = vec![v1::OffsetRange { start: 0, end: 2 }];
    let ack = |subscription_id| v1::AcknowledgeRequest {
        subscription: "s".into(),
        offsets: both.clone(),
        subscription_id,
        ..Default::default()
    };
    let again = v1::Nacked { start: 0, end: 1, delay_ms: Some(0), uncounted: false };
    let nack =
        v1::NackRequest { subscription: "s".into(), offsets: vec![again], subscription_id: old, ..Default::default() };
    let longer = v1::Extension { start: 0, end: 2, deadline_ms: 60_000 };
    let extend = v1::ExtendDeadlineRequest {
        subscription: "s".into(),
        offsets: vec![longer],
        subscription_id: old,
        ..Default::default()
    };
    let to = Some(v1::seek_request::To::Latest(true));
    let seek = v1::SeekRequest { subscription: "s".into(), to, subscription_id: old, ..Default::default() };
    let result = v1::AcknowledgeWithPublishRequest {
        subscription: "s".into(),
        to: "results".into(),
        messages: vec![record("of the earlier one").into()],
        subscription_id: old,
        ..Default::default()
    };
    let refusals = [
        ("ack", calls.acknowledge(ack(old)).await.map(drop)),
        ("nack", calls.nack(nack).await.map(drop)),
        ("extension", calls.extend_deadline(extend).await.map(drop)),
        ("seek", calls.seek(seek).await.map(drop)),
        ("result", calls.acknowledge_with_publish(result).await.map(drop)),
    ];
    for (what, refused) in refusals {
        let refused = Error::from(refused.expect_err(what));
        assert_eq!(reason(refused), "SUBSCRIPTION_RECREATED", "{what}");
    }
    let refused = held.remove(0).ack_with_publish("results", vec![record("by the client")]).await;
    assert_eq!(reason(refused.unwrap_err()), "SUBSCRIPTION_RECREATED");
    held.remove(0).ack();
    assert_eq!(values(&client, "results").await, [""; 0]);
    let acked = calls.acknowledge(ack(new)).await.unwrap().into_inner().acknowledged;
    assert_eq!(acked, 2, "nothing of before has acknowledged them");
}

/// Prints how long it takes; a busy machine makes that longer, so it has no bound here.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_is_made_again_on_three_brokers_is_ready_each_time() {
    let (_cluster, client) = start(3).await;
    let mut times = Vec::new();
    for _ in 0..20 {
        delete_topic(&client, "t").await;
        let spec = v1::TopicSpec { partitions: 1, replicas: 3, ..Default::default() };
        let request = v1::ApplyTopicRequest { name: "t".into(), spec: Some(spec), ..Default::default() };
        let begun = Instant::now();
        change(&client, async |mut admin| admin.apply_topic(request.clone()).await).await.unwrap();
        while refreshed(&client).await.topic("t").is_none_or(|t| t.partitions[0].leader == 0) {
            assert!(begun.elapsed() < PATIENCE, "nobody leads it");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        times.push(begun.elapsed());
        publish(&client, "t", &["a"]).await;
        assert_eq!(values(&client, "t").await, ["a"]);
    }
    times.sort_unstable();
    println!(
        "a topic that was deleted and is made again has a leader after {:?} (median), {:?} (worst)",
        times[10], times[19]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_metrics_of_what_was_deleted_go() {
    let cluster = Cluster::start(1);
    let client = Client::new(&cluster.servers).unwrap();
    for name in ["t", "kept"] {
        make_topic(&client, name, 1, 1).await;
        publish(&client, name, &["a"]).await;
    }
    let drops = v1::SubscriptionSpec { deliveries_max: Some(1), ..spec("t", v1::SubscriptionMode::Shared) };
    subscribe(&client, "s", drops).await.unwrap();
    let mut reader = Subscriber::open(&client, "s", Default::default()).await.unwrap();
    reader.next().await.unwrap().unwrap().nack(None);
    let series = async |part: &str| {
        let text = cluster.metrics(0).await;
        text.lines().filter(|l| !l.starts_with('#') && l.contains(part)).map(str::to_owned).collect::<Vec<_>>()
    };
    until("the dead letter is counted", async || {
        let seen = series("weir_dead_letters_total").await;
        if seen.iter().any(|l| l.contains("\"default/t\"")) { Ok(()) } else { Err(seen) }
    })
    .await;
    assert!(series("\"default/s\"").await.len() >= 3);
    delete_topic(&client, "t").await;
    for gone in ["\"default/t\"", "\"default/s\""] {
        assert_eq!(series(gone).await, [""; 0]);
    }
    assert!(series("\"default/kept\"").await.len() >= 6);
}
