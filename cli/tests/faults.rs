//! Numbered faults over real processes. Others stand where their matter is: 1, 8 (processes that are killed) and 13 in `processes.rs`,
//! 10 and 14 in `replicas.rs`, 4 to 6 in the simulation's `single.rs`, 16 to 18 in the operator's tests and end to end, 19 in
//! `subscriptions.rs`. docs/guarantees.md has the list.

mod cluster;

use cluster::power::Power;
use cluster::writer::{Writer, check};
use cluster::{
    Cluster, Down, PATIENCE, WEIR, in_sync, make_subscription, make_topic, make_topic_of, pid_of, read_all, refreshed,
    until, weir,
};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tonic_types::StatusExt as _;
use weir_checker::Event;
use weir_client::producer::{Options, Producer};
use weir_client::{Client, Error, Record, proto as v1};
use weir_proto::records;
use weir_proto::v1::publisher_client::PublisherClient;

/// Broker that leads the topic's first partition: its id and name.
async fn leader(client: &Client, topic: &str) -> (u64, String) {
    let end = Instant::now() + PATIENCE;
    loop {
        let cluster = refreshed(client).await;
        let id = cluster.topic(topic).map_or(0, |t| t.partitions[0].leader);
        if let Some(broker) = cluster.metadata.brokers.iter().find(|b| b.id == id) {
            return (id, broker.name.clone());
        }
        assert!(Instant::now() < end, "nobody leads {topic}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The leader, once it is the one the placement prefers: leadership does not move by itself from there.
async fn settled_leader(client: &Client, topic: &str) -> (u64, String) {
    let end = Instant::now() + PATIENCE;
    loop {
        let found = leader(client, topic).await;
        let replicas = client.cluster().topic(topic).map_or(vec![], |t| t.partitions[0].replicas.clone());
        if replicas.first() == Some(&found.0) {
            return found;
        }
        assert!(Instant::now() < end, "{} leads {topic}, of {replicas:?} the first should", found.1);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn another_leads(client: &Client, topic: &str, than: u64) -> Duration {
    let begun = Instant::now();
    while leader(client, topic).await.0 == than {
        assert!(begun.elapsed() < PATIENCE, "broker {than} still leads");
    }
    begun.elapsed()
}

async fn publish(client: &Client, topic: &str, within: Duration) -> Result<(), Error> {
    let options = Options { deadline: within, ..Default::default() };
    let producer = Producer::open(client, topic, options).await?;
    let record = Record { value: Some("v".into()), ..Default::default() };
    producer.send(record).await?.await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_02_a_follower_that_is_killed_fails_no_publish() {
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    let writer = Writer::start(&client, "t", 1).await;
    let mut stayed = 0;
    for _ in 0..3 {
        writer.goes_on(1_000).await;
        let before = settled_leader(&client, "t").await;
        let follower = ["weir-0", "weir-1", "weir-2"].into_iter().find(|n| *n != before.1).unwrap();
        writer.take_gap();
        let pid = cluster.pid(follower);
        cluster.kill(follower);
        writer.goes_on(1_000).await;
        println!("a follower killed: longest gap in a key's acks {:?}", writer.take_gap());
        cluster.started_again(follower, pid).await;
        stayed += u32::from(leader(&client, "t").await == before);
        in_sync(&client, "t", 3).await;
    }
    // one that gets no processor, or no disk, for as long as an election takes is replaced whatever became of a follower; not every time
    assert!(stayed > 0, "the leader moves whenever a follower is killed");
    let (seen, unknown) = writer.finish().await;
    assert_eq!(unknown, 0);
    check(&client, "t", 1, &seen).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_03_a_leader_that_was_stopped_acknowledges_nothing_and_names_its_successor() {
    let cluster = Cluster::start(3);
    let client = Client::new(&cluster.servers).unwrap();
    let writer = Writer::start(&client, "t", 1).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (old, name) = leader(&client, "t").await;
    let address = client.cluster().address(old).unwrap();
    let mut publisher = v1::publisher_client::PublisherClient::new(client.channel(&address).unwrap());
    cluster.signal(&name, "-STOP");
    // what is refused as NOT_LEADER is not stored; whether the rest is, nobody was told
    let mut attempts = Vec::new();
    let mut attempt = || {
        let number = attempts.len() as u64;
        attempts.push(Event::Offered { producer: 900 + number, value: (900, number) });
        let value = format!("900-{number}").into();
        let messages = vec![v1::Message { value: Some(value), ..Default::default() }];
        (v1::PublishRequest { topic: "t".into(), partition: Some(0), messages, ..Default::default() }, (900, number))
    };
    let mut again = publisher.clone();
    let asked_while_stopped = {
        let (request, _) = attempt();
        tokio::spawn(async move { again.publish(request).await })
    };
    let took = another_leads(&client, "t", old).await;
    tokio::time::sleep(Duration::from_secs(10).saturating_sub(took)).await;
    cluster.signal(&name, "-CONT");
    // what it takes before it has heard of the other is refused too, once it has
    let end = Instant::now() + PATIENCE;
    let mut refused_for_good = Vec::new();
    loop {
        let (request, value) = attempt();
        let refused = publisher.publish(request).await.expect_err("it does not lead");
        // none where the connection was given up meanwhile
        let (reason, metadata) = refused.get_details_error_info().map(|i| (i.reason, i.metadata)).unwrap_or_default();
        if reason == "NOT_LEADER" {
            refused_for_good.push(Event::Refused { value });
        }
        let (new, _) = leader(&client, "t").await;
        let named = metadata.get("leader").cloned().unwrap_or_default();
        if (reason.as_str(), Some(&named)) == ("NOT_LEADER", client.cluster().address(new).as_ref()) {
            break;
        }
        assert!(Instant::now() < end, "{refused:?} and {named}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(asked_while_stopped.await.unwrap().is_err(), "nothing is acknowledged by one that was replaced");
    println!("a stopped leader was replaced after {took:?}");
    let (mut seen, _) = writer.finish().await;
    attempts.into_iter().chain(refused_for_good).for_each(|event| seen.push(event));
    check(&client, "t", 1, &seen).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_07_without_a_majority_nothing_is_acknowledged_and_all_is_back_afterwards() {
    let cluster = Down::new().start(|serve| {
        serve.arg("--no-restart");
    });
    let client = Client::new(&cluster.servers).unwrap();
    let writer = Writer::start(&client, "t", 3).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (seen, _) = writer.finish().await;
    ["weir-0", "weir-1"].into_iter().for_each(|name| cluster.kill(name));
    let begun = Instant::now();
    let within = Duration::from_secs(3);
    let refused = publish(&client, "t", within).await;
    assert!(matches!(refused, Err(Error::Deadline { .. })), "{refused:?}");
    println!("without a majority a publish with a deadline of {within:?} failed after {:?}", begun.elapsed());
    // an announced leader outlives its broker by moments only
    until("the broker that is left says that it is not ready", async || {
        let (ready, metrics) = (cluster.get(2, "/readyz").await, cluster.metrics(2).await);
        let leaderless = metrics.lines().find_map(|l| l.strip_prefix("weir_partitions_leaderless ")).map(str::to_owned);
        // three partitions, and the metadata group
        let right = ready.contains("503") && leaderless.as_deref() == Some("4");
        if right { Ok(()) } else { Err((ready, leaderless)) }
    })
    .await;
    let cluster = cluster.kill_all().start(|_| {});
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 3, 3).await;
    publish(&client, "other", within).await.expect_err("there is no such topic");
    check(&client, "t", 3, &seen).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_08_all_lose_power_at_once_and_every_acknowledged_record_is_back() {
    let power = Power::new();
    let mut down = Down::new();
    let folder = down.data.path().to_owned();
    for round in 0..4 {
        let cluster = down.start(|serve| power.preload(serve, &folder));
        let client = Client::new(&cluster.servers).unwrap();
        let topic = format!("t{round}");
        let writer = Writer::start(&client, &topic, 3).await;
        writer.goes_on(2_000).await;
        down = cluster.kill_all();
        let seen = writer.abandon();
        let cut = power.cut(&folder);
        let cluster = down.start(|serve| power.preload(serve, &folder));
        let client = Client::new(&cluster.servers).unwrap();
        let begun = Instant::now();
        make_topic(&client, &topic, 3, 3).await;
        let serving = begun.elapsed();
        println!(
            "power cut {round}: {} acknowledged, {cut:?}; serving {serving:?} after the start",
            seen.acknowledged()
        );
        assert!(seen.acknowledged() > 500 && cut.lost_bytes > 0, "{cut:?}");
        check(&client, &topic, 3, &seen).await;
        down = cluster.kill_all();
    }
}

/// That the disk does lose what was not synced: what `quorumMemory` gives up is gone.
#[tokio::test(flavor = "multi_thread")]
async fn fault_08_what_was_never_synced_is_lost_with_the_power() {
    let power = Power::new();
    let (cluster, client, folder) = power.start();
    let spec = v1::TopicSpec { partitions: 1, replicas: 3, quorum_memory: true, ..Default::default() };
    make_topic_of(&client, "t", spec).await;
    let writer = Writer::start_on(&client, "t").await;
    writer.goes_on(2_000).await;
    let down = cluster.kill_all();
    let seen = writer.abandon();
    power.cut(&folder);
    let cluster = down.start(|_| {});
    let client = Client::new(&cluster.servers).unwrap();
    leader(&client, "t").await;
    let report = cluster::writer::report(&client, "t", 1, &seen).await;
    println!("quorumMemory: {} acknowledged, {} lost with the power", seen.acknowledged(), report.count("lost"));
    assert!(report.count("lost") > 0, "this disk loses nothing: the other test proves nothing");
    assert_eq!(report.0.len(), report.count("lost"), "{report}");
}

/// The beginning of a record of 500 bytes in RocksDB's write-ahead log.
const TORN: [u8; 9] = [1, 2, 3, 4, 0xf4, 1, 1, 0, 0];

/// The newest write-ahead log ends within a record.
fn tear(folder: &std::path::Path) {
    let logs = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path());
    let newest = logs.filter(|f| f.extension().is_some_and(|e| e == "log")).max().unwrap();
    let mut file = std::fs::OpenOptions::new().append(true).open(newest).unwrap();
    std::io::Write::write_all(&mut file, &TORN).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_09_a_torn_unsynced_tail_is_filled_again_by_the_leader() {
    let power = Power::new();
    let (cluster, client, folder) = power.start();
    let writer = Writer::start(&client, "t", 3).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let down = cluster.kill_all();
    let seen = writer.abandon();
    let cut = power.cut(&folder.join("weir-1"));
    tear(&folder.join("weir-1/db"));
    let cluster = down.start(|_| {});
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 3, 3).await;
    in_sync(&client, "t", 3).await;
    check(&client, "t", 3, &seen).await;
    let counted = cluster.metrics(1).await;
    let torn = counted.lines().find_map(|l| l.strip_prefix("weir_torn_tail_bytes ")?.parse::<u64>().ok());
    assert!(torn >= Some(TORN.len() as u64), "the torn tail is counted: {torn:?}");
    println!("one of three lost power: {cut:?}, all replicas are whole again");
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_11_a_failed_sync_ends_the_process_and_the_others_go_on() {
    let power = Power::new();
    let (cluster, client, folder) = power.start();
    let writer = Writer::start(&client, "t", 3).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (_, name) = leader(&client, "t").await;
    let before = cluster.pid(&name).unwrap();
    power.fail(&folder.join(&name));
    let end = Instant::now() + PATIENCE;
    while cluster.pid(&name) == Some(before) {
        assert!(Instant::now() < end, "it lives on with a disk that does not sync");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    writer.take_gap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    println!("a leader's sync failed: longest gap in a key's acks in the next 5 s {:?}", writer.take_gap());
    power.repair();
    in_sync(&client, "t", 3).await;
    let (seen, _) = writer.finish().await;
    check(&client, "t", 3, &seen).await;
}

/// A small file system of its own, for as long as this lives.
struct Small(PathBuf);

impl Small {
    fn mount(at: PathBuf, mib: u32) -> Option<Self> {
        std::fs::create_dir_all(&at).unwrap();
        let size = format!("size={mib}m");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&at).status();
        if !mounted.as_ref().is_ok_and(|status| status.success()) {
            println!("file systems cannot be mounted here (root can): not tested");
        }
        mounted.is_ok_and(|status| status.success()).then_some(Self(at))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// Three brokers, each on a small file system; `None` where none can be mounted.
fn on_small_disks() -> Option<(Cluster, Client, [Small; 3])> {
    let down = Down::new();
    let [a, b, c] = ["weir-0", "weir-1", "weir-2"].map(|name| Small::mount(down.data.path().join(name), 800));
    let (Some(a), Some(b), Some(c)) = (a, b, c) else { return None };
    let cluster = down.start(|_| {});
    let client = Client::new(&cluster.servers).unwrap();
    Some((cluster, client, [a, b, c]))
}

/// Takes all there is left on a broker's disk, with a file: what is free as it begins, and not what the broker frees meanwhile.
fn fill(cluster: &Cluster, name: &str) -> PathBuf {
    let ballast = cluster.data.path().join(name).join("ballast");
    let file = std::fs::File::create(&ballast).unwrap();
    let disk = rustix::fs::statvfs(&ballast).unwrap();
    let mut left = disk.f_bavail * disk.f_frsize;
    // the broker writes as well: less may be left by now
    while rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, left).is_err() {
        left -= left / 64;
    }
    ballast
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_12_leadership_moves_off_a_full_disk_and_it_recovers_once_there_is_room() {
    let Some((cluster, client, small)) = on_small_disks() else { return };
    let writer = Writer::start(&client, "t", 3).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (id, name) = leader(&client, "t").await;
    let ballast = fill(&cluster, &name);
    let took = another_leads(&client, "t", id).await;
    writer.take_gap();
    tokio::time::sleep(Duration::from_secs(4)).await;
    println!("a full disk: another led after {took:?}; longest gap in a key's acks since {:?}", writer.take_gap());
    writer.goes_on(1).await; // two of three have room
    std::fs::remove_file(ballast).unwrap();
    let (seen, _) = writer.finish().await;
    in_sync(&client, "t", 3).await;
    check(&client, "t", 3, &seen).await;
    let down = cluster.kill_all();
    drop(small);
    drop(down);
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_12_where_a_majority_has_no_room_publishers_are_told_and_all_goes_on_once_there_is() {
    let Some((cluster, client, small)) = on_small_disks() else { return };
    make_topic(&client, "t", 1, 3).await;
    make_topic(&client, "asked", 1, 3).await;
    // little, so that one that ends within what it is writing can open its store again in what was kept back
    let writer = Writer::start_paced(&client, "t", Duration::from_millis(100)).await;
    make_subscription(&client, "reader", "asked", v1::SubscriptionMode::Exclusive).await;
    for _ in 0..3 {
        publish(&client, "asked", PATIENCE).await.unwrap();
    }
    let ballast = ["weir-1", "weir-2"].map(|name| fill(&cluster, name));
    let begun = Instant::now();
    until("publishers are told that disks are full", async || {
        match publish(&client, "asked", Duration::from_secs(3)).await {
            Err(Error::Refused { code: tonic::Code::ResourceExhausted, reason, .. }) if reason == "DISK_FULL" => Ok(()),
            other => Err(other),
        }
    })
    .await;
    println!("two of three disks are full: publishers were told after {:?}", begun.elapsed());
    // what is small goes on: without acknowledgements retention could make no room
    weir(&cluster, &["consume", "--subscription", "reader", "--max", "3"]);
    until("acknowledgements are kept", async || {
        let seen = client.describe(&["asked".to_owned()]).await.map_err(|e| e.to_string())?;
        let position = seen.iter().flat_map(|p| &p.subscriptions).map(|s| s.position).max();
        if position == Some(3) { Ok(()) } else { Err(format!("{position:?}")) }
    })
    .await;
    assert!(publish(&client, "asked", Duration::from_secs(3)).await.is_err(), "there is no room yet");
    ballast.iter().for_each(|b| std::fs::remove_file(b).unwrap());
    until("publishing goes on", async || publish(&client, "asked", Duration::from_secs(3)).await).await;
    let (seen, _) = writer.finish().await;
    in_sync(&client, "t", 3).await;
    check(&client, "t", 1, &seen).await;
    let down = cluster.kill_all();
    drop(small);
    drop(down);
}

/// MiB of the smallest disk that a broker takes.
const DISK_MIB_MIN: u32 = 512;

/// Publishes batches of one record as fast as they are taken on, until told to stop or the connection is lost; gives how many were
/// acknowledged.
async fn flood(servers: String, bytes: usize, stop: Arc<AtomicBool>) -> u64 {
    let channel = Client::new(&servers).unwrap().channel(&servers).unwrap();
    let value: Vec<u8> = (0..bytes).map(|_| fastrand::u8(..)).collect();
    let record = records::Record { value: Some(value.into()), ..Default::default() };
    let batch = records::encode(&[record], records::Compression::None, None).unwrap();
    let (to, batches) = tokio::sync::mpsc::channel(64);
    let sender = tokio::spawn(async move {
        for id in 1.. {
            let batch = v1::PublishBatch { id, topic: "t".into(), batch: batch.clone(), ..Default::default() };
            if stop.load(Ordering::Relaxed) || to.send(batch).await.is_err() {
                return;
            }
        }
    });
    let mut publisher = PublisherClient::new(channel);
    let mut count = 0;
    let batches = tokio_stream::wrappers::ReceiverStream::new(batches);
    let mut acks = publisher.publish_stream(batches).await.unwrap().into_inner();
    while let Ok(Some(ack)) = acks.message().await {
        match ack.outcome.unwrap() {
            v1::publish_ack::Outcome::BaseOffset(_) => count += 1,
            v1::publish_ack::Outcome::Error(error) => {
                assert!(["DISK_FULL", "OVERLOADED"].contains(&&*error.reason), "{error:?}");
            }
        }
    }
    sender.abort();
    count
}

/// Publishers that never pause, what stops them, and what was acknowledged to them.
struct Flood {
    stop: Arc<AtomicBool>,
    publishers: Vec<tokio::task::JoinHandle<u64>>,
}

impl Flood {
    /// Goes on until the disk is full, and a little longer; the broker lives.
    async fn fill(cluster: &Cluster, client: &Client, bytes: usize) -> Self {
        let before = pid_of(cluster.data.path());
        let stop = Arc::new(AtomicBool::new(false));
        let publishers = (0..4).map(|_| tokio::spawn(flood(cluster.servers.clone(), bytes, stop.clone()))).collect();
        until("publishers are told that the disk is full", async || {
            match publish(client, "t", Duration::from_secs(3)).await {
                Err(Error::Refused { reason, .. }) if reason == "DISK_FULL" => Ok(()),
                other => Err(other),
            }
        })
        .await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(before.is_some() && pid_of(cluster.data.path()) == before, "the broker lives on a full disk");
        Self { stop, publishers }
    }

    async fn acknowledged(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let mut sum = 0;
        for publisher in self.publishers {
            sum += publisher.await.unwrap();
        }
        sum
    }
}

/// Fills the smallest disk, of which a file takes a part, with messages of this size, kills the broker meanwhile, and fills it again.
async fn fill_with_messages(bytes: usize, taken_mib: u64) {
    let down = Down::of(1);
    let Some(small) = Small::mount(down.data.path().to_owned(), DISK_MIB_MIN) else { return };
    let ballast = std::fs::File::create(down.data.path().join("ballast")).unwrap();
    rustix::fs::fallocate(&ballast, rustix::fs::FallocateFlags::empty(), 0, taken_mib << 20).unwrap();
    let cluster = down.start(|_| {});
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 1, 1).await;
    let flood = Flood::fill(&cluster, &client, bytes).await;
    let down = cluster.kill_all();
    let mut acknowledged = flood.acknowledged().await;
    let cluster = down.start(|_| {});
    let client = Client::new(&cluster.servers).unwrap();
    client.connect(PATIENCE).await.unwrap();
    acknowledged += Flood::fill(&cluster, &client, bytes).await.acknowledged().await;
    let stored = read_all(&client, "t", 1).await.len() as u64;
    println!(
        "{} MiB of a disk took {stored} messages of {bytes} bytes until it was full",
        u64::from(DISK_MIB_MIN) - taken_mib
    );
    assert!(stored >= acknowledged && acknowledged > 0, "{acknowledged} of {stored}");
    weir(&cluster, &["topic", "delete", "t"]);
    make_topic(&client, "t", 1, 1).await;
    until("there is room once something is gone", async || publish(&client, "t", Duration::from_secs(3)).await).await;
    let down = cluster.kill_all();
    drop(small);
    drop(down);
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_12_the_smallest_disk_full_of_large_messages_ends_no_broker_and_opens_again() {
    fill_with_messages(200_000, 256).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_12_the_smallest_disk_full_of_small_messages_ends_no_broker_and_opens_again() {
    fill_with_messages(800, 256).await;
}

#[test]
fn fault_12_a_disk_that_is_too_small_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let Some(small) = Small::mount(folder.path().to_owned(), DISK_MIB_MIN - 1) else { return };
    let at = folder.path().to_str().unwrap();
    for brokers in ["1", "3"] {
        let mut serve = Command::new(WEIR);
        serve.args(["serve", "--listen", "127.0.0.1:0", "--brokers", brokers, "--data", at]).env("RUST_BACKTRACE", "0");
        let refused = serve.output().unwrap();
        let why = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(1), "{why}");
        assert!([at, "has 511 MiB", "512 at least"].iter().all(|part| why.contains(part)), "{why}");
        assert_eq!(why.matches("at least").count(), 1, "said once, before a broker is started: {why}");
    }
    drop(small);
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => copy_folder(&entry.path(), &target),
            kind if kind.is_file() => drop(std::fs::copy(entry.path(), target).unwrap()),
            _ => {} // a socket
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_22_a_volume_that_is_rolled_back_is_set_aside_and_rebuilt() {
    let cluster = Down::new().start(|_| {});
    let client = Client::new(&cluster.servers).unwrap();
    let writer = Writer::start(&client, "t", 3).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (first, _) = writer.finish().await;
    let down = cluster.kill_all();
    let (now, old) = (down.data.path().join("weir-1"), down.data.path().join("copy"));
    copy_folder(&now, &old);
    let cluster = down.start(|_| {});
    let client = Client::new(&cluster.servers).unwrap();
    let writer = Writer::start(&client, "later", 3).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (later, _) = writer.finish().await;
    in_sync(&client, "later", 3).await;
    let id = |client: &Client| {
        client.cluster().metadata.brokers.iter().find(|b| b.name == "weir-1" && b.phase == "active").map(|b| b.id)
    };
    let before = id(&client);
    let down = cluster.kill_all();
    std::fs::remove_dir_all(&now).unwrap();
    std::fs::rename(&old, &now).unwrap();
    let cluster = down.start(|_| {});
    let client = Client::new(&cluster.servers).unwrap();
    client.connect(PATIENCE).await.unwrap();
    in_sync(&client, "t", 3).await;
    in_sync(&client, "later", 3).await;
    assert_ne!(id(&client), before, "it has joined as another broker");
    assert!(now.join("db.aside-1").exists(), "its data is kept, apart");
    check(&client, "t", 3, &first).await;
    check(&client, "later", 3, &later).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_22_two_volumes_of_three_that_are_rolled_back_stop_the_cluster_which_names_both() {
    const OLD: [&str; 2] = ["weir-0", "weir-1"];
    let cluster = Down::new().start(|_| {});
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 1, 3).await;
    publish(&client, "t", PATIENCE).await.unwrap();
    let down = cluster.kill_all();
    let folder = down.data.path().to_owned();
    let copy = |name: &str| folder.join(format!("copy of {name}"));
    // the folders change places with their copies
    let swap = || {
        for name in OLD {
            let (now, aside) = (folder.join(name), folder.join("on its way"));
            for (from, to) in [(&now, &aside), (&copy(name), &now), (&aside, &copy(name))] {
                std::fs::rename(from, to).unwrap();
            }
        }
    };
    OLD.iter().for_each(|name| copy_folder(&folder.join(name), &copy(name)));
    let cluster = down.start(|_| {});
    let client = Client::new(&cluster.servers).unwrap();
    let writer = Writer::start(&client, "later", 3).await;
    writer.goes_on(500).await;
    let (later, _) = writer.finish().await;
    let down = cluster.kill_all();
    swap();
    for _ in 0..2 {
        let said = down.refused();
        assert!(said.contains("the volumes of weir-0 and weir-1 were rolled back to older copies"), "{said}");
    }
    let aside = OLD.map(|name| folder.join(name).join("db.aside-1").exists());
    assert_eq!(aside, [false; 2], "nobody could rebuild them: they are left as they are");
    swap();
    let cluster = down.start(|_| {});
    let client = Client::new(&cluster.servers).unwrap();
    client.connect(PATIENCE).await.unwrap();
    in_sync(&client, "later", 3).await;
    check(&client, "later", 3, &later).await;
    assert_eq!(cluster::read_all(&client, "t", 1).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_15_a_wall_clock_that_jumps_expires_nothing_early_and_moves_no_leader() {
    let power = Power::new();
    let (_cluster, client, _) = power.start();
    let spec = v1::TopicSpec { partitions: 1, replicas: 3, retention_ms: Some(600_000), ..Default::default() };
    make_topic_of(&client, "t", spec).await;
    let writer = Writer::start_on(&client, "t").await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    for seconds in [3_600, -3_600] {
        let mut stayed = false;
        // a broker that gets no processor for as long as an election takes is replaced whatever the clock says, but not every time
        for _ in 0..3 {
            let before = settled_leader(&client, "t").await;
            power.jump(seconds);
            // retention looks every five seconds
            tokio::time::sleep(Duration::from_secs(6)).await;
            stayed = leader(&client, "t").await == before;
            if stayed {
                break;
            }
            power.jump(0);
        }
        assert!(stayed, "the leader moves whenever the clock jumps by {seconds} s");
    }
    let (seen, unknown) = writer.finish().await;
    assert_eq!(unknown, 0);
    check(&client, "t", 1, &seen).await;
}
