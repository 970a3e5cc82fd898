//! Replicas that must be made again: after damage, after a removal, and of the largest batches. Three real processes.

mod cluster;

use cluster::{Cluster, PATIENCE, change, in_sync, make_topic, make_topic_of, refreshed, start, until};
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

/// Cuts off the second half of a file.
fn halve(file: &Path) {
    let whole = std::fs::read(file).unwrap();
    std::fs::write(file, &whole[..whole.len() / 2]).unwrap();
}

/// Kills a broker and does something to its folder before it is started again.
async fn killed(cluster: &Cluster, name: &str, meanwhile: impl Fn(&Path) -> bool) {
    let folder = cluster.data.path().join(name).join("db");
    let end = Instant::now() + PATIENCE;
    // what is in the write-ahead log goes to table and blob files with a start
    loop {
        let before = cluster.pid(name);
        if cluster.kill_and(name, || meanwhile(&folder)) {
            return;
        }
        assert!(Instant::now() < end, "its folder never looks as it should");
        cluster.started_again(name, before).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

/// The partitions in which no broker of this name votes, as their leaders see it: other brokers hear of it later. What is not caught up
/// does not vote. An error where a leader says nothing.
async fn without_vote_of(client: &Client, name: &str) -> Result<Vec<String>, Error> {
    let metadata = refreshed(client).await.metadata.clone();
    // the one whose disk was lost may still be named, and vote
    let id = metadata.brokers.iter().filter(|b| b.name == name).map(|b| b.id).max();
    let statuses = client.describe(&[]).await?;
    let votes = |p: &v1::Partition| {
        let status = statuses.iter().filter(|s| s.group == p.group).max_by_key(|s| s.term);
        status.into_iter().flat_map(|s| &s.replicas).any(|r| r.voter && Some(r.broker) == id)
    };
    let partitions = metadata.topics.iter().flat_map(|t| t.partitions.iter().map(|p| (&t.name, p)));
    let silent = partitions.clone().find(|(_, p)| statuses.iter().all(|s| s.group != p.group));
    if let Some((topic, partition)) = silent {
        let last = format!("the leader of {topic}/{} says nothing", partition.partition);
        return Err(Error::Deadline { after: PATIENCE, last });
    }
    Ok(partitions.filter(|(_, p)| !votes(p)).map(|(topic, p)| format!("{topic}/{}", p.partition)).collect())
}

/// Kubernetes counts pods that are ready: one whose broker lacks anything must not be among them, or the next node is drained too early.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_is_ready_again_only_once_it_has_everything_also_where_its_disk_was_lost() {
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 3, 3).await;
    publish(&client, "t", 2_000, 50 << 10).await;
    in_sync(&client, "t", 3).await;
    let before = cluster.pid("weir-2");
    cluster.kill_and("weir-2", || std::fs::remove_dir_all(cluster.data.path().join("weir-2/db")).unwrap());
    cluster.started_again("weir-2", before).await;
    let (end, mut said) = (Instant::now() + PATIENCE, std::collections::BTreeSet::new());
    loop {
        assert!(Instant::now() < end, "not ready: {said:?}");
        let answer = cluster.try_get(2, "/readyz").await.unwrap_or_default();
        if answer.contains("200 OK") {
            break;
        }
        said.extend(answer.lines().last().map(str::to_owned));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let lacks = loop {
        match without_vote_of(&client, "weir-2").await {
            Ok(lacks) => break lacks,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
    };
    assert!(lacks.is_empty(), "ready, and not a voter of {lacks:?}; before: {said:?}");
    in_sync(&client, "t", 3).await;
    assert!(said.iter().any(|s| s.contains("lack something that was committed")), "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_10_a_bit_that_flipped_in_an_old_record_is_found_by_its_reader_and_the_replica_is_rebuilt() {
    let (cluster, client) = start(3).await;
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
    let zero = "weir_damaged_replicas_total{consequence=\"quarantined\"} 0";
    assert!(metrics.contains("weir_damaged_replicas_total") && !metrics.contains(zero), "{metrics}");
}

/// Waits until a broker of another id has taken the place of the second one, with everything.
async fn replaced(client: &Client) {
    until("a new broker under the old name", async || {
        let seen = client.refresh().await.map_err(|e| e.to_string())?;
        let ids: Vec<(u64, String)> = seen.metadata.brokers.iter().map(|b| (b.id, b.name.clone())).collect();
        if ids.len() == 3 && ids.iter().all(|(id, _)| *id != 2) { Ok(()) } else { Err(format!("{ids:?}")) }
    })
    .await;
    in_sync(client, "t", 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_10_a_store_that_is_damaged_as_a_whole_is_set_aside_and_rebuilt_from_the_others() {
    let (cluster, client) = start(3).await;
    publish(&client, "t", 200, 1 << 10).await;
    killed(&cluster, "weir-1", |db| {
        // in the middle of synced data, not a torn tail
        let logs = files(db, "log");
        let log = logs.iter().find(|l| std::fs::metadata(l).is_ok_and(|m| m.len() > 100_000));
        log.inspect(|log| flip(log)).is_some()
    })
    .await;
    replaced(&client).await;
    assert!(cluster.data.path().join("weir-1/db.aside-1").exists());
    cluster.kill("weir-0"); // the rebuilt one and another are a majority
    until("everything is read", async || match read(&client, "t").await {
        Ok(seen) if seen == once_each(200) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
}

/// Waits until the second broker is [`replaced`] and everything is read; gives the folder set aside.
async fn rebuilt(cluster: &Cluster, client: &Client, count: u64) -> PathBuf {
    replaced(client).await;
    let cluster_now = refreshed(client).await;
    let new = cluster_now.metadata.brokers.iter().find(|b| b.name == "weir-1").unwrap();
    assert!(new.rebuilt_because.starts_with("its store was damaged: "), "the others know why: {new:?}");
    let metrics = cluster.metrics(1).await;
    assert!(metrics.contains("weir_damaged_replicas_total{consequence=\"store_rebuilt\"} 1"), "{metrics}");
    let aside = cluster.data.path().join("weir-1/db.aside-1");
    assert!(aside.exists() && !cluster.data.path().join("weir-1/db.aside-2").exists(), "rebuilt once");
    until("everything is read", async || match read(client, "t").await {
        Ok(seen) if seen == once_each(count) => Ok(()),
        other => Err(format!("{:?}", other.map(|seen| seen.len()))),
    })
    .await;
    aside
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_10_a_flipped_bit_in_any_table_leads_to_one_rebuild() {
    let (cluster, client) = start(3).await;
    publish(&client, "t", 200, 1 << 10).await;
    // the largest are those of the state and of the log: what meets them first may be a start, an election or a compaction
    killed(&cluster, "weir-1", |db| {
        let mut tables = files(db, "sst");
        tables.sort_by_key(|t| std::fs::metadata(t).map_or(0, |m| m.len()));
        tables.iter().rev().take(2).for_each(|t| flip(t));
        tables.len() > 1
    })
    .await;
    // a start may find it at once; else reading all of it does
    let aside = rebuilt(&cluster, &client, 200).await;
    assert_eq!(verify(&aside)["remedy"], "rebuild");
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_10_a_missing_manifest_leads_to_one_rebuild() {
    let (cluster, client) = start(3).await;
    publish(&client, "t", 200, 1 << 10).await;
    killed(&cluster, "weir-1", |db| {
        let all = std::fs::read_dir(db).unwrap().filter_map(|e| Some(e.ok()?.path()));
        let manifest = all.into_iter().find(|p| p.file_name().unwrap().to_str().unwrap().starts_with("MANIFEST"));
        manifest.is_some_and(|manifest| std::fs::remove_file(manifest).is_ok())
    })
    .await;
    rebuilt(&cluster, &client, 200).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_10_a_write_ahead_log_that_was_cut_off_leads_to_one_rebuild() {
    let (cluster, client) = start(3).await;
    publish(&client, "t", 200, 1 << 10).await;
    killed(&cluster, "weir-1", |db| {
        let logs = files(db, "log");
        let large = logs.iter().find(|l| std::fs::metadata(l).is_ok_and(|m| m.len() > 100_000));
        large.inspect(|log| halve(log)).is_some()
    })
    .await;
    rebuilt(&cluster, &client, 200).await;
}

/// What `weir-broker verify` reports of a database's folder; it is linked into a folder of its own, as a broker has it, beside the name
/// of its cluster.
fn verify(database: &Path) -> serde_json::Value {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(database.with_file_name("cluster"), folder.path().join("cluster")).unwrap();
    std::os::unix::fs::symlink(database, folder.path().join("db")).unwrap();
    let report = weir_broker::verify::verify(folder.path()).unwrap();
    serde_json::to_value(report).unwrap()
}

/// A broker alone whose records are in blob files, killed.
async fn alone_with_files() -> cluster::Down {
    let (cluster, client) = start(1).await;
    publish(&client, "t", 700, 32 << 10).await;
    let cluster = cluster.kill_all().start(|_| {});
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 1, 1).await;
    make_topic(&client, "u", 1, 1).await;
    publish(&client, "u", 10, 100).await;
    cluster.kill_all()
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_10_a_lone_brokers_missing_files_cost_nothing_once_they_are_back_and_the_rest_is_served_without_them() {
    let mut down = alone_with_files().await;
    let (db, away) = (down.data.path().join("db"), down.data.path().join("away"));
    std::fs::create_dir(&away).unwrap();
    let moved = |from: &Path, to: &Path| {
        for file in files(from, "blob") {
            std::fs::rename(&file, to.join(file.file_name().unwrap())).unwrap();
        }
    };
    moved(&db, &away);
    assert_eq!(verify(&db)["remedy"], "restore");
    for _ in 0..2 {
        let cluster = down.start(|_| {});
        let client = Client::new(&cluster.servers).unwrap();
        until("the rest is served", async || match read(&client, "u").await {
            Ok(seen) if seen == once_each(10) => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        down = cluster.kill_all();
    }
    moved(&away, &db);
    assert_eq!(verify(&db)["remedy"], "none");
    let cluster = down.start(|_| {});
    let client = Client::new(&cluster.servers).unwrap();
    until("everything is read", async || match read(&client, "t").await {
        Ok(seen) if seen == once_each(700) => Ok(()),
        other => Err(format!("{:?}", other.map(|seen| seen.len()))),
    })
    .await;
    publish(&client, "t", 1, 10).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_09_a_lone_broker_without_its_log_does_not_start_until_the_loss_is_accepted() {
    let (cluster, client) = start(1).await;
    publish(&client, "t", 100, 500).await;
    let down = cluster.kill_all();
    let log = files(&down.data.path().join("db"), "log").pop().unwrap();
    halve(&log);
    let serve = |more: &[(&str, &str)]| {
        let mut serve = std::process::Command::new(cluster::WEIR);
        serve.args(["serve", "--listen", "127.0.0.1:0", "--data"]).arg(down.data.path());
        serve.envs(more.iter().copied()).output().unwrap()
    };
    let refused = serve(&[]);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && text.contains("acknowledged records are lost"), "{text}");
    let write = text.split("--accept-loss ").nth(1).expect("the flag is named");
    let write: String = write.chars().take_while(char::is_ascii_digit).collect();
    assert!(!serve(&[("WEIR_ACCEPT_LOSS", "1")]).status.success(), "another loss");
    let cluster = down.start(|serve| {
        serve.env("WEIR_ACCEPT_LOSS", &write);
    });
    let client = Client::new(&cluster.servers).unwrap();
    let end = Instant::now() + PATIENCE;
    let left = loop {
        match read(&client, "t").await {
            Ok(seen) => break seen.len(),
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert!(left < 100, "{left}");
    publish(&client, "t", 1, 10).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_14_a_broker_that_was_drained_and_removed_joins_again_under_its_name() {
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 2, 1).await;
    publish(&client, "t", 100, 100).await;
    let brokers = async || client.refresh().await.map(|c| c.metadata.brokers.clone()).map_err(|e| e.to_string());
    let drain = async |id, cancel| {
        let drained =
            change(&client, async |mut admin| admin.drain_broker(v1::DrainBrokerRequest { id, cancel }).await);
        drained.await.map_err(|e| e.to_string())
    };
    make_topic(&client, "three", 1, 3).await;
    let refusal = drain(3, false).await.unwrap_err();
    assert!(refusal.contains("topic default/three wants 3 replicas, and 2 active brokers would be left"), "{refusal}");
    make_topic(&client, "three", 1, 1).await;
    drain(3, false).await.unwrap();
    until("drained and removed", async || {
        let seen = brokers().await?;
        if seen.iter().all(|b| b.id != 3) { Ok(()) } else { Err(format!("{seen:?}")) }
    })
    .await;
    until("it may join again", async || {
        let request = v1::AddBrokerRequest { name: "weir-2".into() };
        client.admin().await.map_err(|e| e.to_string())?.add_broker(request).await.map(drop).map_err(|e| e.to_string())
    })
    .await;
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
    let (cluster, client) = start(3).await;
    let spec = v1::TopicSpec { partitions: 1, replicas: 3, message_bytes_max: Some(32 << 20), ..Default::default() };
    make_topic_of(&client, "t", spec).await;
    let largest = (32 << 20) - 1_000; // the batch's own header and the record's
    let options = Options { deadline: PATIENCE, ..Default::default() };
    let producer = Producer::open(&client, "t", options).await.unwrap();
    for at in 0..4 {
        let mut value = format!("{at} ").into_bytes();
        value.resize(largest, b'.');
        let sent = producer.send(Record { value: Some(value.into()), ..Default::default() }).await.unwrap();
        sent.await.unwrap();
    }
    // a replica that has nothing gets a checkpoint and all of them
    cluster.kill_and("weir-1", || std::fs::remove_dir_all(cluster.data.path().join("weir-1")).unwrap());
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
    let (_cluster, client) = start(1).await;
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
