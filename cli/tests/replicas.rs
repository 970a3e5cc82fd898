//! Replicas that must be made again: after damage, after a removal, and of the largest batches. Three real processes.

mod cluster;

use cluster::{Cluster, PATIENCE, in_sync, make_topic, until};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use weir_client::consumer::{From, read_partition};
use weir_client::producer::{Options, Producer};
use weir_client::{Client, Error, Record};
use weir_proto::v1;

/// Publishes `count` values of `bytes` and waits for their acks.
async fn publish(client: &Client, topic: &str, count: u64, bytes: usize) {
    let producer = Producer::open(client, topic, Options::default()).await.unwrap();
    let mut under_way = Vec::new();
    for at in 0..count {
        let mut value = format!("{at} ").into_bytes();
        value.resize(bytes, b'.');
        under_way.push(producer.send(Record { value: Some(value.into()), ..Default::default() }).await.unwrap());
    }
    for outcome in under_way {
        outcome.await.unwrap();
    }
}

/// Reads a topic of one partition: how often each value stands in it, or the first error.
async fn read(client: &Client, topic: &str) -> Result<HashMap<u64, u32>, Error> {
    let (sender, mut receiver) = tokio::sync::mpsc::channel(16);
    tokio::spawn(read_partition(client.clone(), topic.to_owned(), 0, From::Earliest, true, sender));
    let mut out = HashMap::new();
    while let Some(messages) = receiver.recv().await {
        for message in messages? {
            let value = message.record.value.unwrap();
            let end = value.iter().position(|b| *b == b' ').unwrap();
            *out.entry(std::str::from_utf8(&value[..end]).unwrap().parse().unwrap()).or_insert(0) += 1;
        }
    }
    Ok(out)
}

fn once_each(count: u64) -> HashMap<u64, u32> {
    (0..count).map(|at| (at, 1)).collect()
}

async fn leader_is(client: &Client, topic: &str, broker: u64) {
    until("the preferred leader leads", async || {
        let cluster = client.refresh().await.map_err(|e| e.to_string())?;
        let leader = cluster.topic(topic).map_or(0, |t| t.partitions[0].leader);
        if leader == broker { Ok(()) } else { Err(leader.to_string()) }
    })
    .await;
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let list = std::fs::read_dir(folder).unwrap().filter_map(|e| Some(e.ok()?.path()));
    let mut list: Vec<PathBuf> = list.filter(|p| p.extension().is_some_and(|e| e == extension)).collect();
    list.sort();
    list
}

/// Flips one bit in the middle of a file.
fn flip(file: &Path) {
    let mut bytes = std::fs::read(file).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 4;
    std::fs::write(file, bytes).unwrap();
}

/// Kills a broker and does something to its folder before it is started again.
async fn killed(cluster: &Cluster, name: &str, meanwhile: impl Fn(&Path) -> bool) {
    let folder = cluster.data.path().join(name).join("db");
    let end = Instant::now() + PATIENCE;
    // what is in the write-ahead log goes to table and blob files with a start
    loop {
        let before = cluster.pid(name);
        cluster.kill(name);
        tokio::time::sleep(Duration::from_millis(50)).await;
        if meanwhile(&folder) {
            return;
        }
        assert!(Instant::now() < end, "its folder never looks as it should");
        while cluster.pid(name).is_none_or(|pid| Some(pid) == before) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_10_a_bit_that_flipped_in_an_old_record_is_found_by_its_reader_and_the_replica_is_rebuilt() {
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 1, 3).await;
    // more than is kept in memory after a start
    publish(&client, "t", 1_500, 32 << 10).await;
    let preferred = client.cluster().topic("t").unwrap().partitions[0].replicas[0];
    let name = format!("weir-{}", preferred - 1);
    killed(&cluster, &name, |db| {
        let blobs = files(db, "blob");
        blobs.iter().for_each(|b| flip(b));
        !blobs.is_empty()
    })
    .await;
    leader_is(&client, "t", preferred).await;
    // a reader may meet the damage, or find the replica replaced already; in the end everything is there
    until("everything is read", async || {
        let seen = read(&client, "t").await.map_err(|e| e.to_string())?;
        if seen == once_each(1_500) { Ok(()) } else { Err(format!("{} values", seen.len())) }
    })
    .await;
    publish(&client, "t", 1, 10).await;
    in_sync(&client, "t", 3).await;
    let metrics = cluster.metrics(preferred as usize - 1).await;
    let damage = metrics.lines().find(|l| l.starts_with("weir_damaged_replicas_total ")).unwrap();
    assert_ne!(damage, "weir_damaged_replicas_total 0");
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_10_a_store_that_is_damaged_as_a_whole_is_set_aside_and_rebuilt_from_the_others() {
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 1, 3).await;
    publish(&client, "t", 200, 1 << 10).await;
    killed(&cluster, "weir-1", |db| {
        // in the middle of synced data, not a torn tail
        let logs = files(db, "log");
        let log = logs.iter().find(|l| std::fs::metadata(l).is_ok_and(|m| m.len() > 100_000));
        log.inspect(|log| flip(log)).is_some()
    })
    .await;
    until("a new broker under the old name", async || {
        let seen = client.refresh().await.map_err(|e| e.to_string())?;
        let ids: Vec<(u64, String)> = seen.metadata.brokers.iter().map(|b| (b.id, b.name.clone())).collect();
        if ids.len() == 3 && ids.iter().all(|(id, _)| *id != 2) { Ok(()) } else { Err(format!("{ids:?}")) }
    })
    .await;
    in_sync(&client, "t", 3).await;
    assert!(cluster.data.path().join("weir-1/db.aside-1").exists());
    cluster.kill("weir-0"); // the rebuilt one and another are a majority
    until("everything is read", async || match read(&client, "t").await {
        Ok(seen) if seen == once_each(200) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_14_a_broker_that_was_drained_and_removed_joins_again_under_its_name() {
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 2, 1).await;
    publish(&client, "t", 100, 100).await;
    let brokers = async || client.refresh().await.map(|c| c.metadata.brokers.clone()).map_err(|e| e.to_string());
    let drain = v1::DrainBrokerRequest { id: 3, cancel: false };
    client.admin().await.unwrap().drain_broker(drain).await.unwrap();
    until("drained and removed", async || {
        let seen = brokers().await?;
        if seen.iter().all(|b| b.id != 3) { Ok(()) } else { Err(format!("{seen:?}")) }
    })
    .await;
    client.admin().await.unwrap().add_broker(v1::AddBrokerRequest { name: "weir-2".into() }).await.unwrap();
    until("it joins again", async || {
        let seen = brokers().await?;
        let again = seen.iter().any(|b| b.name == "weir-2" && b.id > 3 && b.phase == "active");
        if again { Ok(()) } else { Err(format!("{seen:?}")) }
    })
    .await;
    make_topic(&client, "u", 1, 3).await;
    publish(&client, "u", 100, 100).await;
    in_sync(&client, "u", 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_of_the_largest_size_are_published_replicated_rebuilt_and_read() {
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 1, 3).await;
    let spec = v1::TopicSpec { partitions: 1, replicas: 3, message_bytes_max: 32 << 20, ..Default::default() };
    let request = v1::ApplyTopicRequest { name: "t".into(), spec: Some(spec), ..Default::default() };
    client.admin().await.unwrap().apply_topic(request).await.unwrap();
    let largest = (32 << 20) - 1_000; // the batch's own header and the record's
    let producer = Producer::open(&client, "t", Options::default()).await.unwrap();
    for at in 0..4 {
        let mut value = format!("{at} ").into_bytes();
        value.resize(largest, b'.');
        let sent = producer.send(Record { value: Some(value.into()), ..Default::default() }).await.unwrap();
        sent.await.unwrap();
    }
    // a replica that has nothing gets a checkpoint and all of them
    let folder = cluster.data.path().join("weir-1");
    cluster.kill("weir-1");
    while folder.exists() {
        let _ = std::fs::remove_dir_all(&folder);
    }
    until("a new broker", async || {
        let seen = client.refresh().await.map_err(|e| e.to_string())?;
        if seen.metadata.brokers.iter().any(|b| b.id > 3) { Ok(()) } else { Err(String::new()) }
    })
    .await;
    in_sync(&client, "t", 3).await;
    cluster.kill("weir-0");
    until("all are read", async || match read(&client, "t").await {
        Ok(seen) if seen == once_each(4) => Ok(()),
        Ok(seen) => Err(format!("{seen:?}")),
        Err(error) => Err(error.to_string()),
    })
    .await;
    let mut value = b"9 ".to_vec();
    value.resize(33 << 20, b'.');
    let sent = producer.send(Record { value: Some(value.into()), ..Default::default() }).await.unwrap();
    let Err(Error::Refused { reason, message, .. }) = sent.await else { panic!("a larger one was taken") };
    assert_eq!(reason, "TOO_LARGE", "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn producers_and_subscribers_follow_a_topic_that_grows() {
    use weir_client::subscriber::Subscriber;
    let cluster = Cluster::start(1);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 1, 1).await;
    cluster::make_subscription(&client, "s", "t", v1::SubscriptionMode::Shared).await;
    let producer = Producer::open(&client, "t", Options::default()).await.unwrap();
    let mut subscriber = Subscriber::open(&client, "s", Default::default()).await.unwrap();
    make_topic(&client, "t", 4, 1).await;
    let mut partitions = std::collections::BTreeSet::new();
    let end = Instant::now() + PATIENCE;
    let mut at = 0;
    while partitions.len() < 4 {
        at += 1;
        let record = Record { key: Some(format!("k{at}").into()), value: Some("x".into()), ..Default::default() };
        producer.send(record).await.unwrap().await.unwrap();
        let next = tokio::time::timeout(PATIENCE, subscriber.next()).await.expect("what was published comes");
        let delivered = next.unwrap().unwrap();
        partitions.insert(delivered.message.partition);
        delivered.ack();
        assert!(Instant::now() < end, "still {partitions:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
