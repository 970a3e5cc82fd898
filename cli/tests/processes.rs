//! Real processes on loopback: `weir serve --brokers 3`, killed brokers, removed folders, and a checker that reads everything back.

mod cluster;

use cluster::writer::{Writer, check};
use cluster::{Cluster, PATIENCE, WEIR, in_sync, make_topic, subscribe, until};
use std::collections::HashMap;
use std::process::{Command, Stdio};
use std::time::Duration;
use weir_client::{Client, Record};
use weir_proto::v1;

#[tokio::test(flavor = "multi_thread")]
async fn fault_01_one_broker_killed_after_the_other_loses_nothing() {
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    let writer = Writer::start(&client, "t", 6).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let kills = std::env::var("KILLS").ok().and_then(|v| v.parse().ok()).unwrap_or(30);
    let mut gaps = Vec::new();
    for at in 0..kills {
        writer.take_gap();
        cluster.kill(["weir-0", "weir-1", "weir-2"][at % 3]);
        tokio::time::sleep(Duration::from_millis(3_500)).await;
        gaps.push(writer.take_gap());
    }
    let (seen, unknown) = writer.finish().await;
    println!("{kills} kills, {} records acknowledged, {unknown} unknown", seen.acknowledged());
    histogram(gaps);
    assert!(seen.acknowledged() > 1_000);
    check(&client, "t", 6, &seen).await;
}

/// Longest gaps in a key's acks, one a kill.
fn histogram(mut gaps: Vec<Duration>) {
    gaps.sort();
    let at = |part: f64| gaps[((gaps.len() as f64 * part).ceil() as usize).clamp(1, gaps.len()) - 1];
    println!("longest gap in a key's acks: median {:?}, p99 {:?}, worst {:?}", at(0.5), at(0.99), at(1.0));
    for step in 0..=gaps[gaps.len() - 1].as_millis() / 100 {
        let count = gaps.iter().filter(|g| g.as_millis() / 100 == step).count();
        println!("{:>5} to {:>4} ms {count:>4} {}", step * 100, (step + 1) * 100, "#".repeat(count));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_killed_at_once_come_back_with_every_acknowledged_record() {
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    let writer = Writer::start(&client, "t", 3).await;
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_secs(2)).await;
        ["weir-0", "weir-1", "weir-2"].into_iter().for_each(|name| cluster.kill(name));
        tokio::time::sleep(Duration::from_secs(4)).await;
    }
    let (seen, unknown) = writer.finish().await;
    println!("3 times all killed, {} records acknowledged, {unknown} unknown", seen.acknowledged());
    assert!(seen.acknowledged() > 1_000);
    check(&client, "t", 3, &seen).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_13_a_broker_whose_folder_is_removed_is_rebuilt_from_the_others() {
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 3, 3).await;
    let writer = Writer::start_paced(&client, "t", Duration::from_millis(10)).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    lose_volume(&cluster, "weir-1");
    replaced(&client, "t", 2).await;
    // the rebuilt one and one other are a majority: what they have is enough
    cluster.kill("weir-2");
    tokio::time::sleep(Duration::from_secs(4)).await;
    let (seen, unknown) = writer.finish().await;
    println!("rebuilt; {} records acknowledged, {unknown} unknown", seen.acknowledged());
    check(&client, "t", 3, &seen).await;
}

/// Waits until a broker's place is taken by another, with all its replicas.
async fn replaced(client: &Client, topic: &str, old: u64) {
    until("it is replaced", async || {
        let seen = client.refresh().await.map_err(|e| e.to_string())?;
        let ids: Vec<u64> = seen.metadata.brokers.iter().map(|b| b.id).collect();
        let whole = |p: &v1::Partition| p.settled && p.replicas.iter().all(|r| *r != old) && p.replicas.len() == 3;
        let all = seen.topic(topic).is_some_and(|t| t.partitions.iter().all(whole));
        if ids.len() == 3 && !ids.contains(&old) && all { Ok(()) } else { Err(format!("{:?}", seen.metadata)) }
    })
    .await;
}

/// Found by `make soak`: metadata begins with the brokers that formed the cluster, and whoever joined last refused to hear any other.
#[tokio::test(flavor = "multi_thread")]
async fn brokers_that_lose_their_volumes_one_after_the_other_until_none_is_left_that_formed_the_cluster_are_replaced() {
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 3, 3).await;
    // each is filled again with all there is, at a bounded rate
    let writer = Writer::start_paced(&client, "t", Duration::from_millis(10)).await;
    for name in ["weir-0", "weir-1", "weir-2", "weir-1"] {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let id = |c: &weir_client::Cluster| c.metadata.brokers.iter().find(|b| b.name == name).map_or(0, |b| b.id);
        let old = id(&client.cluster());
        lose_volume(&cluster, name);
        until("it has joined under another id", async || {
            let now = client.refresh().await.map_err(|e| e.to_string())?;
            if [0, old].contains(&id(&now)) { Err(format!("{:?}", now.metadata.brokers)) } else { Ok(()) }
        })
        .await;
        // whoever it met while it joined, it has to find again
        cluster.kill(name);
        replaced(&client, "t", old).await;
    }
    let (seen, unknown) = writer.finish().await;
    println!("four volumes lost; {} records acknowledged, {unknown} unknown", seen.acknowledged());
    in_sync(&client, "t", 3).await;
    check(&client, "t", 3, &seen).await;
}

/// Kills a broker and removes its folder before it is started again.
fn lose_volume(cluster: &Cluster, name: &str) {
    let folder = cluster.data.path().join(name);
    cluster.kill_and(name, || std::fs::remove_dir_all(folder).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_embedded_broker_keeps_messages_and_cursors_over_a_restart() {
    let cluster = Cluster::start(1);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 1, 1).await;
    let spec = v1::SubscriptionSpec { topic: "t".into(), from_earliest: true, ..Default::default() };
    subscribe(&client, "s", spec).await.unwrap();
    run(&cluster, &["publish", "t"], "one\ntwo\nthree\n");
    assert_eq!(run(&cluster, &["consume", "--subscription", "s", "--max", "2", "-o", "raw"], ""), "one\ntwo\n");
    let data = cluster.stop();
    let cluster = Cluster::start_in(data, 1);
    assert_eq!(run(&cluster, &["consume", "--subscription", "s", "--max", "1", "-o", "raw"], ""), "three\n");
    assert_eq!(
        run(&cluster, &["consume", "--topic", "t", "--from", "earliest", "--max", "3", "-o", "raw"], ""),
        "one\ntwo\nthree\n"
    );
}

fn run(cluster: &Cluster, args: &[&str], input: &str) -> String {
    use std::io::Write as _;
    let mut command = Command::new(WEIR);
    command.args(args).env("WEIR_SERVER", &cluster.servers).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "weir {args:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_by_name() {
    let cluster = Cluster::start(1);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 1, 1).await;
    let channel = client.channel(&cluster.servers).unwrap();
    let mut publisher = v1::publisher_client::PublisherClient::new(channel.clone()).max_encoding_message_size(64 << 20);
    let publish = |topic: &str, partition: u32, bytes: usize| v1::PublishRequest {
        topic: topic.to_owned(),
        partition: Some(partition),
        messages: vec![v1::Message { value: Some(vec![7; bytes].into()), ..Default::default() }],
        ..Default::default()
    };
    let mut codes = Vec::new();
    for request in
        [publish("", 0, 1), publish("../x", 0, 1), publish("nope", 0, 1), publish("t", 9, 1), publish("t", 0, 2 << 20)]
    {
        codes.push(publisher.publish(request).await.unwrap_err().code());
    }
    use tonic::Code::{InvalidArgument, NotFound, OutOfRange};
    assert_eq!(codes, [InvalidArgument, InvalidArgument, NotFound, NotFound, InvalidArgument]);
    // a right one, without a producer id, is answered, and stored once
    let answer = tokio::time::timeout(PATIENCE, publisher.publish(publish("t", 0, 1))).await;
    assert_eq!(answer.expect("an answer").unwrap().into_inner().base_offset, 0);
    let mut log = v1::log_client::LogClient::new(channel.clone());
    let fetch = v1::FetchRequest { topic: "t".into(), offset: 5, ..Default::default() };
    let status = log.fetch(fetch).await.unwrap_err();
    assert_eq!(status.code(), OutOfRange);
    assert!(status.message().contains("0 to 1"), "{}", status.message());
    // a batch whose checksum is wrong is refused on the stream, and the stream goes on
    let good = weir_proto::records::encode(
        &[Record { value: Some("x".into()), ..Default::default() }],
        Default::default(),
        None,
    )
    .unwrap();
    let mut bad = good.to_vec();
    *bad.last_mut().unwrap() ^= 1;
    let batch = |id, bytes: Vec<u8>| v1::PublishBatch {
        id,
        topic: "t".into(),
        partition: 0,
        batch: bytes.into(),
        ..Default::default()
    };
    let requests = futures::stream::iter([batch(1, bad), batch(2, good.to_vec())]);
    let mut acks = publisher.publish_stream(requests).await.unwrap().into_inner();
    let mut outcomes = HashMap::new();
    while let Some(ack) = acks.message().await.unwrap() {
        outcomes.insert(ack.id, ack.outcome.unwrap());
    }
    let v1::publish_ack::Outcome::Error(error) = &outcomes[&1] else { panic!("{outcomes:?}") };
    assert_eq!((error.reason.as_str(), error.code), ("BATCH", InvalidArgument as i32));
    assert_eq!(outcomes[&2], v1::publish_ack::Outcome::BaseOffset(1));
}

/// Bad inputs 1 to 4, a thousand of each: the state is untouched, each is counted, and memory stays where it was.
#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_bad_inputs_are_refused_and_counted_and_take_no_memory() {
    let cluster = Cluster::start(1);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 1, 1).await;
    let number = async |name: &str| -> f64 {
        let text = cluster.metrics(0).await;
        text.lines().filter(|l| l.starts_with(name)).filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    };
    let record = Record { value: Some(vec![7; 100_000].into()), ..Default::default() };
    let good = weir_proto::records::encode(&[record], Default::default(), None).unwrap().to_vec();
    let broken = |at: usize, byte: u8| {
        let mut bad = good.clone();
        bad[at] ^= byte;
        weir_proto::records::seal(&mut bad);
        bad
    };
    // record count, last offset delta, codec, length, magic; a batch that ends early, and none at all
    let mut bad = vec![broken(60, 1), broken(26, 1), broken(22, 7), broken(11, 1), broken(16, 1)];
    bad.extend([good[..40].to_vec(), good[..good.len() - 1].to_vec(), Vec::new()]);
    let channel = client.channel(&cluster.servers).unwrap();
    let mut publisher = v1::publisher_client::PublisherClient::new(channel);
    let (before, rejected) = (number("process_resident_memory_bytes").await, number("weir_rejected_total").await);
    let batches: Vec<Vec<u8>> = bad.iter().cycle().take(4_000).cloned().collect();
    let requests = batches.into_iter().enumerate().map(|(id, batch)| v1::PublishBatch {
        id: id as u64,
        topic: "t".into(),
        partition: 0,
        batch: batch.into(),
        ..Default::default()
    });
    let mut acks = publisher.publish_stream(futures::stream::iter(requests)).await.unwrap().into_inner();
    let mut refused = 0;
    while let Some(ack) = acks.message().await.unwrap() {
        let Some(v1::publish_ack::Outcome::Error(error)) = ack.outcome else { panic!("{ack:?}") };
        assert!(error.code == tonic::Code::InvalidArgument as i32, "{error:?}");
        refused += 1;
    }
    assert_eq!(refused, 4_000);
    for name in ["", "../x", "a\0b", &"x".repeat(300), "UPPER", "a/b/c"] {
        for _ in 0..100 {
            let messages = vec![v1::Message::default()];
            let request = v1::PublishRequest { topic: name.into(), partition: Some(0), messages, ..Default::default() };
            assert_eq!(publisher.publish(request).await.unwrap_err().code(), tonic::Code::InvalidArgument, "{name:?}");
        }
    }
    let after = number("process_resident_memory_bytes").await;
    assert!(after - before < 96e6, "memory went from {before} to {after}");
    assert_eq!(number("weir_rejected_total").await - rejected, 4_600.0);
    let status = client.describe(&["t".to_owned()]).await.unwrap();
    assert_eq!(status[0].high_watermark, 0, "nothing was appended");
}
