//! A broker that was away while the others were published to as fast as it goes: how long it takes until it has everything again under
//! that load, and what all of it takes of the disks meanwhile. `make away` runs it; it takes minutes and up to 15 GB.

mod cluster;

use cluster::{Cluster, Down, disk_bytes, in_sync, make_topic_of};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use weir_client::{Client, proto as v1};

/// Bytes that each partition keeps.
const KEPT: u64 = 512 << 20;
const PARTITIONS: u32 = 3;
/// All brokers' folders together may have so many bytes.
const DISK_BYTES_MAX: u64 = 15_000_000_000;
/// What it is to take at most until all is in sync again. It took more than 240 s before publishers were slowed.
const IN_SYNC_WITHIN: Duration = Duration::from_secs(240);
const GONE: &str = "weir-2";

/// A process of this test's own, ended with it.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether all replicas are in sync, and what is seen.
async fn look(cluster: &Cluster, client: &Client) -> (bool, u64, String) {
    let statuses = client.describe(&["load".to_owned()]).await.unwrap_or_default();
    let in_sync = |p: &v1::PartitionStatus| p.replicas.iter().filter(|r| r.in_sync && r.voter).count();
    let behind = |p: &v1::PartitionStatus| p.replicas.iter().map(|r| r.bytes_behind).max().unwrap_or(0);
    let mib = |bytes: u64| bytes >> 20;
    let partition = |p: &v1::PartitionStatus| {
        let (in_sync, behind, kept) = (in_sync(p), mib(behind(p)), mib(p.log_bytes));
        format!("{in_sync} in sync, {behind} MiB behind, {kept} MiB kept, slowed {}%", p.slowed_percent)
    };
    let disks = ["weir-0", "weir-1", GONE].map(|name| disk_bytes(&cluster.data.path().join(name)));
    let all: u64 = disks.iter().sum();
    assert!(all < DISK_BYTES_MAX, "{disks:?} bytes are on disk");
    let text: Vec<String> = statuses.iter().map(partition).collect();
    let done = statuses.len() == PARTITIONS as usize && statuses.iter().all(|p| in_sync(p) == 3);
    (done, all, format!("disks {:?} MiB; {}", disks.map(mib), text.join("; ")))
}

async fn end(client: &Client) -> u64 {
    client.describe(&["load".to_owned()]).await.unwrap().iter().map(|p| p.high_watermark).sum()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes, a processor and gigabytes: make away"]
async fn a_broker_that_was_away_under_full_load_is_in_sync_again_while_the_load_goes_on() {
    let away = Duration::from_secs(std::env::var("AWAY").map_or(90, |seconds| seconds.parse().unwrap()));
    let cluster = Down::new().start(|serve| {
        serve.arg("--no-restart");
    });
    let client = Client::new(&cluster.servers).unwrap();
    let spec = v1::TopicSpec { partitions: PARTITIONS, replicas: 3, retention_bytes: Some(KEPT), ..Default::default() };
    make_topic_of(&client, "load", spec).await;
    in_sync(&client, "load", 3).await;
    let mut load = Command::new(cluster::WEIR);
    load.args(["bench", "produce", "--topic", "load", "--size", "1024", "--records", "1000000000"]);
    load.env("WEIR_SERVER", &cluster.servers).stdout(Stdio::null()).stderr(Stdio::null());
    let _load = Process(load.spawn().unwrap());
    tokio::time::sleep(Duration::from_secs(20)).await;
    // its arguments, to start it again by
    let pid = cluster.pid(GONE).unwrap();
    let line = String::from_utf8(std::fs::read(format!("/proc/{pid}/cmdline")).unwrap()).unwrap();
    let line: Vec<&str> = line.trim_end_matches('\0').split('\0').collect();
    cluster.kill(GONE);
    let (begun, before) = (Instant::now(), end(&client).await);
    let mut most = 0;
    while begun.elapsed() < away {
        tokio::time::sleep(Duration::from_secs(5)).await;
        let (_, disk, seen) = look(&cluster, &client).await;
        most = most.max(disk);
        println!("{:>4} s away: {seen}", begun.elapsed().as_secs());
    }
    let published = end(&client).await;
    let rate = (published - before) as f64 / begun.elapsed().as_secs_f64();
    // it ends with the pipe that it has for its input
    let back = Command::new(line[0]).args(&line[1..]).stdin(Stdio::piped()).spawn().unwrap();
    let _back = Process(back);
    let begun = Instant::now();
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let (done, disk, seen) = look(&cluster, &client).await;
        most = most.max(disk);
        println!("{:>4} s back: {seen}", begun.elapsed().as_secs());
        if done {
            break;
        }
        assert!(begun.elapsed() < IN_SYNC_WITHIN, "not in sync");
    }
    let took = begun.elapsed();
    let then = (end(&client).await - published) as f64 / took.as_secs_f64();
    println!(
        "away for {away:?} at {rate:.0} records/s; in sync {took:.1?} after its start, at {then:.0} records/s; {} MiB on three disks at \
         most, of {} MiB that are to be kept",
        most >> 20,
        u64::from(PARTITIONS) * 3 * (KEPT >> 20),
    );
}
