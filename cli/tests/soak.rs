//! Load, faults and checks for as long as asked, with memory, open files and disk watched: `make soak MINUTES=60`.
//! Round after round a topic is written to and read by a subscription while brokers are killed, stopped, cut off from their power
//! or their data; then everything is held against what was seen, and the topic goes. Another topic is written to all the time and
//! kept small by its retention. In the end each broker's memory, open files and disk are drawn, and must not have grown.

mod cluster;

use cluster::power::Power;
use cluster::writer::{Writer, check};
use cluster::{Cluster, Down, disk_bytes, in_sync, pid_of, spec, subscribe, until};
use fastrand::Rng;
use plotters::prelude::*;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use weir_client::subscriber::{self, Subscriber};
use weir_client::{Client, proto as v1};

const NAMES: [&str; 3] = ["weir-0", "weir-1", "weir-2"];
/// Bytes the standing topic keeps, each partition.
const KEPT: u64 = 32 << 20;

/// What a broker had at one time; zeros while it is down.
#[derive(Clone, Copy, Default)]
struct Sample {
    seconds: f64,
    rss_mib: f64,
    files: f64,
    disk_mib: f64,
}

type Curve = (&'static str, fn(&Sample) -> f64);

/// What is drawn and looked at.
const CURVES: [Curve; 3] =
    [("memory (RSS), MiB", |s| s.rss_mib), ("open files", |s| s.files), ("disk, MiB", |s| s.disk_mib)];

fn sample(folder: &Path, seconds: f64) -> Sample {
    let Some(pid) = pid_of(folder) else { return Sample { seconds, ..Default::default() } };
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = status.lines().find_map(|l| l.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
    Sample {
        seconds,
        rss_mib: kib.unwrap_or(0.0) / 1024.0,
        files: files as f64,
        disk_mib: disk_bytes(folder) as f64 / f64::from(1 << 20),
    }
}

/// What is sampled, twice a second, while a cluster is there.
#[derive(Default)]
struct Watch {
    samples: [Vec<Sample>; 3],
    /// faults by second
    faults: Vec<(f64, String)>,
}

/// One fault, and its end.
async fn fault(cluster: &Cluster, client: &Client, topic: &str, draw: &mut Rng) -> String {
    let name = NAMES[draw.usize(..3)];
    let alive = |name: &str| cluster.pid(name).is_some();
    if !NAMES.iter().all(|n| alive(n)) {
        return "none: one is down already".into();
    }
    match draw.usize(..10) {
        0..=4 => {
            cluster.kill(name);
            format!("kill {name}")
        }
        5 | 6 => {
            cluster.signal(name, "-STOP");
            tokio::time::sleep(Duration::from_secs(3)).await;
            cluster.signal(name, "-CONT");
            format!("stop {name} for 3 s")
        }
        7 => {
            cluster.signal(name, "-TERM");
            format!("end {name}")
        }
        8 => {
            NAMES.iter().for_each(|n| cluster.kill(n));
            "kill all".into()
        }
        _ => {
            // the others must have everything before one may lose it
            in_sync(client, topic, 3).await;
            in_sync(client, "standing", 3).await;
            cluster.kill(name);
            let folder = cluster.data.path().join(name);
            while folder.exists() {
                let _ = std::fs::remove_dir_all(&folder);
            }
            until("its replicas are elsewhere", async || {
                let seen = client.refresh().await.map_err(|e| e.to_string())?;
                if seen.metadata.brokers.len() == 3 { Ok(()) } else { Err(format!("{:?}", seen.metadata.brokers)) }
            })
            .await;
            in_sync(client, topic, 3).await;
            in_sync(client, "standing", 3).await;
            format!("{name} loses its volume")
        }
    }
}

/// Reads a subscription to its end, and counts what came.
async fn consume(client: Client, subscription: String, stop: Arc<AtomicBool>, count: Arc<AtomicU64>) {
    let mut subscriber = Subscriber::open(&client, &subscription, subscriber::Options::default()).await.unwrap();
    while !stop.load(Ordering::Relaxed) {
        match tokio::time::timeout(Duration::from_millis(500), subscriber.next()).await {
            Ok(Some(Ok(delivered))) => {
                count.fetch_add(1, Ordering::Relaxed);
                delivered.ack();
            }
            Ok(Some(Err(error))) => println!("subscription: {error}"),
            Ok(None) => break,
            Err(_) => {}
        }
    }
    subscriber.close().await;
}

/// One round: a topic of its own, faults, checks. Returns what was acknowledged and how many came to the subscription.
async fn round(
    cluster: &Cluster,
    client: &Client,
    number: u32,
    draw: &mut Rng,
    watch: &Mutex<Watch>,
    begun: Instant,
) -> (usize, u64) {
    let topic = format!("round-{number}");
    cluster::make_topic_of(client, &topic, v1::TopicSpec { partitions: 6, replicas: 3, ..Default::default() }).await;
    until("the subscription is taken", async || {
        subscribe(client, &topic, spec(&topic, v1::SubscriptionMode::KeyShared)).await.map_err(|e| e.to_string())
    })
    .await;
    let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let reader = tokio::spawn(consume(client.clone(), topic.clone(), stop.clone(), count.clone()));
    let writer = Writer::start_paced(client, &topic, Duration::from_millis(60)).await;
    let end = Instant::now() + Duration::from_secs(50);
    while Instant::now() < end {
        tokio::time::sleep(Duration::from_secs(4)).await;
        let at = begun.elapsed().as_secs_f64();
        let what = fault(cluster, client, &topic, draw).await;
        watch.lock().unwrap().faults.push((at, what));
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    let (seen, _) = writer.finish().await;
    in_sync(client, &topic, 3).await;
    check(client, &topic, 6, &seen).await;
    until("the subscription has read everything", async || {
        let status = client.describe(std::slice::from_ref(&topic)).await.map_err(|e| e.to_string())?;
        let left: u64 = status.iter().flat_map(|p| &p.subscriptions).map(|s| s.backlog).sum();
        if left == 0 && status.len() == 6 { Ok(()) } else { Err(format!("{left} of {} partitions", status.len())) }
    })
    .await;
    stop.store(true, Ordering::Relaxed);
    reader.await.unwrap();
    until("it is deleted", async || {
        let mut admin = client.admin().await.map_err(|e| e.to_string())?;
        let name = topic.clone();
        let gone = admin.delete_subscription(v1::DeleteRequest { name: name.clone(), ..Default::default() }).await;
        gone.map_err(|e| e.to_string()).map(drop)?;
        admin.delete_topic(v1::DeleteRequest { name, ..Default::default() }).await.map_err(|e| e.to_string()).map(drop)
    })
    .await;
    (seen.acknowledged(), count.load(Ordering::Relaxed))
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "make soak MINUTES=n"]
async fn soak() {
    let minutes: f64 = std::env::var("MINUTES").ok().and_then(|m| m.parse().ok()).unwrap_or(2.0);
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let power = Power::new();
    let mut down = Down::new();
    let folder = down.data.path().to_owned();
    let begun = Instant::now();
    let watch = Arc::new(Mutex::new(Watch::default()));
    let (mut draw, mut rounds, mut acknowledged, mut delivered, mut cuts) = (Rng::with_seed(seed), 0, 0, 0, 0);
    while begun.elapsed().as_secs_f64() < minutes * 60.0 {
        let cluster = down.start(|serve| power.preload(serve, &folder));
        let client = Client::new(&cluster.servers).unwrap();
        let spec = v1::TopicSpec { partitions: 3, replicas: 3, retention_bytes: Some(KEPT), ..Default::default() };
        cluster::make_topic_of(&client, "standing", spec).await;
        let standing = Writer::start_paced(&client, "standing", Duration::from_millis(60)).await;
        let stop = Arc::new(AtomicBool::new(false));
        let sampling = {
            let (watch, folder, stop) = (watch.clone(), folder.clone(), stop.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let at = begun.elapsed().as_secs_f64();
                    let seen = NAMES.map(|name| sample(&folder.join(name), at));
                    let mut watch = watch.lock().unwrap();
                    watch.samples.iter_mut().zip(seen).for_each(|(all, one)| all.push(one));
                    drop(watch);
                    std::thread::sleep(Duration::from_millis(500));
                }
            })
        };
        // some rounds, then all lose their power at once
        for _ in 0..5 {
            let (written, read) = round(&cluster, &client, rounds, &mut draw, &watch, begun).await;
            rounds += 1;
            acknowledged += written;
            delivered += read;
            println!(
                "{:.1} of {minutes} min: {rounds} rounds, {acknowledged} acknowledged, {delivered} delivered, {} faults, {cuts} power cuts",
                begun.elapsed().as_secs_f64() / 60.0,
                watch.lock().unwrap().faults.len()
            );
            if begun.elapsed().as_secs_f64() > minutes * 60.0 {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        sampling.join().unwrap();
        standing.abandon();
        down = cluster.kill_all();
        power.cut(&folder);
        cuts += 1;
        watch.lock().unwrap().faults.push((begun.elapsed().as_secs_f64(), "all lose power".into()));
    }
    let out = PathBuf::from(std::env::var("OUT").unwrap_or_else(|_| "soak".into()));
    std::fs::create_dir_all(&out).unwrap();
    let watch = watch.lock().unwrap();
    draw_picture(&watch, &out.join("soak.svg"));
    write_samples(&watch, &out.join("soak.csv"));
    let mut kinds: std::collections::BTreeMap<String, u32> = Default::default();
    for (_, what) in &watch.faults {
        *kinds.entry(NAMES.iter().fold(what.clone(), |text, name| text.replace(name, "a broker"))).or_default() += 1;
    }
    println!(
        "{minutes} minutes, seed {seed}: {rounds} rounds, {acknowledged} acknowledged in their topics, none lost; {delivered} delivered"
    );
    kinds.iter().for_each(|(what, count)| println!("{count} × {what}"));
    println!("pictures: {}", out.display());
    for (what, value) in CURVES {
        for (name, samples) in NAMES.iter().zip(&watch.samples) {
            let values: Vec<f64> = samples.iter().map(value).filter(|v| *v > 0.0).collect();
            let (first, last) = (median(&values[..values.len() / 2]), median(&values[values.len() / 2..]));
            let most = values.iter().copied().fold(0.0, f64::max);
            println!("{name}: {what}: median of the first half {first:.0}, of the second {last:.0}, most {most:.0}");
            assert!(last < first * 1.5 + 64.0, "{name}: {what} grows");
        }
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

fn write_samples(watch: &Watch, path: &Path) {
    let mut text = String::from("seconds,broker,rss_mib,open_files,disk_mib\n");
    for (name, samples) in NAMES.iter().zip(&watch.samples) {
        for s in samples {
            writeln!(text, "{:.1},{name},{:.1},{},{:.1}", s.seconds, s.rss_mib, s.files, s.disk_mib).unwrap();
        }
    }
    std::fs::write(path, text).unwrap();
}

/// Three curves a panel, one for each broker: memory, open files, disk.
fn draw_picture(watch: &Watch, path: &Path) {
    let area = SVGBackend::new(path, (1_000, 900)).into_drawing_area();
    area.fill(&WHITE).unwrap();
    for (panel, (title, value)) in area.split_evenly((3, 1)).into_iter().zip(CURVES) {
        let all = watch.samples.iter().flatten();
        let (minutes, most) = all.fold((0.1f64, 1.0f64), |(m, v), s| (m.max(s.seconds / 60.0), v.max(value(s))));
        let mut chart = ChartBuilder::on(&panel)
            .caption(title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(28)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..minutes, 0.0..most * 1.1)
            .unwrap();
        chart.configure_mesh().light_line_style(TRANSPARENT).x_desc("minutes").draw().unwrap();
        for (samples, colour) in watch.samples.iter().zip([&BLUE, &RED, &GREEN]) {
            // ten seconds a point are enough to see a trend by
            let points = samples.iter().step_by(20).map(|s| (s.seconds / 60.0, value(s)));
            chart.draw_series(LineSeries::new(points, colour)).unwrap();
        }
    }
    area.present().unwrap();
}
