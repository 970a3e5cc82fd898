//! Weir: three brokers and one, as `weir serve` runs them, driven by `weir bench`.

use crate::run::{Stage, number_after, page, run};
use crate::{Figures, Load};
use anyhow::{Context as _, ensure};
use serde_json::Value;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Longest wait for brokers to serve and topics to be led.
const START_MAX: Duration = Duration::from_secs(180);

pub(crate) const SETTINGS: &str = "this commit, three brokers, 6 partitions, three replicas, each acknowledged when a majority has synced it; \
    as it comes (linger 0.5 ms, batches of 128 KiB); `weir bench`. After each run the number of records read is held against the number \
    acknowledged, and the offsets acknowledged must have no gap";

/// `weir serve`, running.
pub(crate) struct Weir<'a> {
    program: &'a Path,
    pub(crate) stage: Stage,
    servers: String,
    /// brokers' names and processes
    pids: Vec<(String, u32)>,
    /// where their metrics are
    metrics: Vec<String>,
    /// from the start until the brokers said that they serve
    pub(crate) came_up: Duration,
}

/// A topic's manifest; what else its spec holds begins with a comma.
pub(crate) fn topic(name: &str, partitions: u32, replicas: u32, more: &str) -> String {
    format!(
        "apiVersion: weir.dev/v1alpha1\nkind: Topic\nmetadata: {{name: {name}}}\nspec: {{partitions: {partitions}, replicas: {replicas}{more}}}\n---\n"
    )
}

const MEMORY: &str = ", durability: quorumMemory";

pub(crate) fn figures(program: &Path, load: &Load) -> anyhow::Result<Figures> {
    let mut out = Figures::default();
    three_brokers(program, load, &mut out)?;
    one_broker(program, load, &mut out)?;
    in_process(load, &mut out)?;
    Ok(out)
}

fn three_brokers(program: &Path, load: &Load, out: &mut Figures) -> anyhow::Result<()> {
    let topics = load.sizes().map(|(_, bytes, _)| topic(&format!("load-{bytes}"), 6, 3, ""));
    let paced = topic("paced", 6, 3, ", retention: {bytes: 32Mi}");
    let topics = topics.concat() + &topic("latency", 1, 3, "") + &topic("memory", 1, 3, MEMORY) + &paced;
    let weir = start(program, 3, &[], topics)?;
    for (name, bytes, records) in load.sizes() {
        let topic = format!("load-{bytes}");
        out.put(&format!("three {name}"), weir.produce(&topic, bytes, records, &[])?["records_per_second"].as_f64());
        weir.consume(&topic, records)?;
    }
    out.put("latency three p50 µs", weir.latency("latency", load.singles, "acked")?);
    out.put("latency three, memory p50 µs", weir.latency("memory", load.singles, "acked")?);
    out.put("memory MiB", Some(weir.stage.memory_mib()));
    // ten thousand a second, while retention deletes and memtables are flushed
    let seconds = (30.0 * load.scale).ceil() as u64;
    let paced = |name: &str, out: &mut Figures| -> anyhow::Result<()> {
        let done = weir.produce("paced", 1_024, 10_000 * seconds, &["--rate", "10000"])?;
        for (quantile, key) in [("p99", "p99"), ("p99.9", "p999")] {
            out.put(&format!("{name} {quantile} µs"), done["latency_us"][key].as_f64());
        }
        Ok(())
    };
    paced("at 10,000/s, all brokers whole,", out)?;
    // and a broker whose disk was lost is filled again
    let (name, pid) = weir.pids.last().context("three brokers")?;
    let id = weir.id(name)?;
    weir.kill(*pid)?;
    let lost = weir.stage.folder("data")?.join(name);
    let begun = Instant::now();
    while let Err(error) = std::fs::remove_dir_all(&lost) {
        // what was killed may take a moment to end
        ensure!(begun.elapsed() < Duration::from_millis(900), "{} cannot be removed: {error}", lost.display());
        std::thread::sleep(Duration::from_millis(10));
    }
    weir.until_leading_elsewhere(id)?;
    paced("at 10,000/s", out)?;
    // a leader that goes while another replica is still filled leaves no majority: that would measure the filling
    weir.until_whole()?;
    out.put("leader killed ms", Some(weir.failover("latency")?));
    Ok(())
}

fn one_broker(program: &Path, load: &Load, out: &mut Figures) -> anyhow::Result<()> {
    let topics = load.sizes().map(|(_, bytes, _)| topic(&format!("load-{bytes}"), 6, 1, ""));
    let socket = tempfile::tempdir()?;
    let path = socket.path().join("weir.sock");
    let topics = topics.concat() + &topic("memory", 1, 1, MEMORY) + &topic("beside", 6, 1, "");
    let mut weir = start(program, 1, &["--socket".as_ref(), path.as_os_str()], topics)?;
    std::thread::sleep(Duration::from_secs(3)); // what is needed once is done by then
    out.put("idle broker MiB", Some(crate::run::resident_mib(weir.pids[0].1)));
    for (name, bytes, records) in load.sizes() {
        let topic = format!("load-{bytes}");
        out.put(&format!("one {name}"), weir.produce(&topic, bytes, records, &[])?["records_per_second"].as_f64());
        out.put(&format!("read {name}"), Some(weir.consume(&topic, records)?));
    }
    // as fast as it can, alone and while another client reads a backlog as fast as that can
    let (_, bytes, records) = load.sizes()[1];
    let rate = |done: Value| done["records_per_second"].as_f64().context("a rate");
    let alone = rate(weir.produce("beside", bytes, records, &[])?)?;
    let beside = std::thread::scope(|scope| {
        let reading = scope.spawn(|| weir.consume("load-1024", records));
        let beside = weir.produce("beside", bytes, records, &[]).and_then(rate);
        reading.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        beside
    })?;
    out.put("one 1 KiB while another reads, % of alone", Some(beside / alone * 100.0));
    out.put("to consumer p50 µs", weir.latency("memory", load.singles, "read")?);
    weir.servers = format!("unix:{}", path.display());
    out.put("to consumer over a Unix socket p50 µs", weir.latency("memory", load.singles, "read")?);
    Ok(())
}

fn in_process(load: &Load, out: &mut Figures) -> anyhow::Result<()> {
    let embedded = weir_bench::Embedded::start("bench", 1)?;
    let mut took = embedded.one_by_one("memory", load.singles, true)?;
    took.sort_unstable();
    out.put("to consumer in process p50 µs", Some(took[took.len() / 2].as_secs_f64() * 1e6));
    Ok(())
}

/// Starts brokers, and waits until the topics of the manifests are led.
pub(crate) fn start<'a>(program: &'a Path, brokers: u32, more: &[&OsStr], topics: String) -> anyhow::Result<Weir<'a>> {
    start_in(None, program, brokers, more, topics)
}

/// As [`start`], with data that is kept in a folder of the caller's.
pub(crate) fn start_in<'a>(
    data: Option<&Path>,
    program: &'a Path,
    brokers: u32,
    more: &[&OsStr],
    topics: String,
) -> anyhow::Result<Weir<'a>> {
    let mut stage = Stage::new()?;
    let manifests = stage.folder("manifests")?;
    std::fs::write(manifests.join("topics.yaml"), &topics)?;
    let mut serve = Command::new(program);
    serve.args(["serve", "-o", "json", "--listen", "127.0.0.1:0"]);
    if brokers > 1 {
        serve.args(["--brokers", &brokers.to_string()]);
    }
    serve.args(["--metrics-listen", "127.0.0.1:0"]).arg("--manifests").arg(manifests).args(more);
    serve.arg("--data").arg(data.map_or_else(|| stage.folder("data"), |data| Ok(data.to_owned()))?);
    stage.start("weir", &mut serve)?;
    let mut weir =
        Weir { program, stage, servers: String::new(), pids: Vec::new(), metrics: Vec::new(), came_up: Duration::ZERO };
    weir.wait(topics.matches("kind: Topic").count())?;
    Ok(weir)
}

impl Weir<'_> {
    fn json(&self, args: &[&str]) -> anyhow::Result<Value> {
        let text = run(Command::new(self.program).args(["--server", &self.servers, "-o", "json"]).args(args))?;
        let line = text.lines().find(|l| l.starts_with(['{', '['])).with_context(|| format!("no JSON in: {text}"))?;
        Ok(serde_json::from_str(line)?)
    }

    /// Until the brokers say where they are and all topics are led.
    fn wait(&mut self, topics: usize) -> anyhow::Result<()> {
        let begun = Instant::now();
        let described = loop {
            let log = self.stage.log("weir");
            if let Some(line) = log.lines().find(|l| l.starts_with("{\"brokers\"")) {
                break serde_json::from_str::<Value>(line)?;
            }
            ensure!(begun.elapsed() < START_MAX, "weir serve does not come up:\n{log}");
            std::thread::sleep(Duration::from_millis(5));
        };
        self.came_up = begun.elapsed();
        let brokers = described["brokers"].as_array().context("brokers")?;
        self.servers = brokers.iter().filter_map(|b| b["client"].as_str()).collect::<Vec<_>>().join(",");
        loop {
            let leaders = self.leaders().unwrap_or_default();
            let names: BTreeSet<&str> = leaders.iter().map(|(name, _)| name.as_str()).collect();
            if names.len() == topics && leaders.iter().all(|(_, leader)| *leader != 0) {
                break;
            }
            ensure!(begun.elapsed() < START_MAX, "the topics do not come up:\n{}", self.stage.log("weir"));
            std::thread::sleep(Duration::from_millis(200));
        }
        for broker in brokers {
            let (name, pid) = (broker["name"].as_str().context("a name")?, broker["pid"].as_u64().context("a pid")?);
            self.pids.push((name.to_owned(), pid as u32));
            self.metrics.extend(broker["metrics"].as_str().map(str::to_owned));
        }
        Ok(())
    }

    /// The id under which a broker is a member now: one that lost its disk has another.
    fn id(&self, name: &str) -> anyhow::Result<u64> {
        let status = self.json(&["cluster", "status"])?;
        let broker = status["brokers"].as_array().into_iter().flatten().find(|b| b["name"] == name);
        broker.and_then(|b| b["id"].as_u64()).with_context(|| format!("{name} is no member: {status}"))
    }

    /// Publishes, and checks that the offsets acknowledged have no gap.
    pub(crate) fn produce(&self, topic: &str, bytes: usize, records: u64, more: &[&str]) -> anyhow::Result<Value> {
        let (bytes, records) = (bytes.to_string(), records.to_string());
        let args = ["bench", "produce", "--topic", topic, "--records", &records, "--size", &bytes];
        let done = self.json(&[&args[..], more].concat())?;
        ensure!(done["gaps"] == 0, "offsets of {topic} that nobody was told of: {done}");
        Ok(done)
    }

    /// Reads so many records, all that were acknowledged.
    pub(crate) fn consume_all(&self, topic: &str, records: u64) -> anyhow::Result<Value> {
        let done = self.json(&["bench", "consume", "--topic", topic, "--records", &records.to_string()])?;
        ensure!(done["records"] == records, "{records} records of {topic} were acknowledged: {done}");
        Ok(done)
    }

    /// As [`Self::consume_all`]; how many a second.
    fn consume(&self, topic: &str, records: u64) -> anyhow::Result<f64> {
        self.consume_all(topic, records)?["records_per_second"].as_f64().context("a rate")
    }

    /// The brokers' processes.
    pub(crate) fn pids(&self) -> impl Iterator<Item = u32> {
        self.pids.iter().map(|(_, pid)| *pid)
    }

    /// Syncs of all brokers' logs so far.
    pub(crate) fn syncs(&self) -> anyhow::Result<f64> {
        let mut sum = 0.0;
        for at in &self.metrics {
            let page = page(at, "/metrics")?;
            sum += number_after(&page, "weir_sync_seconds_count").context("syncs in the metrics")?;
        }
        Ok(sum)
    }

    /// Of one record in flight, µs, median.
    fn latency(&self, topic: &str, records: u64, until: &str) -> anyhow::Result<Option<f64>> {
        let done =
            self.json(&["bench", "latency", "--topic", topic, "--records", &records.to_string(), "--until", until])?;
        Ok(done["latency_us"]["p50"].as_f64())
    }

    fn kill(&self, pid: u32) -> anyhow::Result<()> {
        run(Command::new("kill").args(["-9", &pid.to_string()])).map(drop)
    }

    fn leaders(&self) -> anyhow::Result<Vec<(String, u64)>> {
        let listed = self.json(&["topic", "list"])?;
        let topics = listed.as_array().context("topics")?.iter();
        let of = |t: &Value| -> Vec<(String, u64)> {
            let name = t["name"].as_str().unwrap_or_default();
            let partitions = t["assignment"].as_array().into_iter().flatten();
            partitions.map(|p| (name.to_owned(), p["leader"].as_u64().unwrap_or(0))).collect()
        };
        Ok(topics.flat_map(of).collect())
    }

    /// Until every partition has a leader, and none of them is this broker.
    fn until_leading_elsewhere(&self, broker: u64) -> anyhow::Result<()> {
        let begun = Instant::now();
        while !self.leaders().is_ok_and(|all| all.iter().all(|(_, leader)| *leader != 0 && *leader != broker)) {
            ensure!(begun.elapsed() < START_MAX, "broker {broker} still leads");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Until every partition has all its replicas, in sync.
    fn until_whole(&self) -> anyhow::Result<()> {
        let begun = Instant::now();
        loop {
            let topics: BTreeSet<String> = self.leaders()?.into_iter().map(|(topic, _)| topic).collect();
            let described = topics.iter().map(|topic| self.json(&["topic", "describe", topic]));
            let described: Vec<Value> = described.collect::<anyhow::Result<_>>()?;
            match described.iter().find(|topic| !is_whole(topic)) {
                None => return Ok(()),
                Some(topic) => ensure!(begun.elapsed() < START_MAX, "a replica is not in sync again: {topic}"),
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Kills the leader of a topic's partition while it is published to; the longest wait for an acknowledgement, ms. What is read
    /// afterwards is held against what was acknowledged.
    fn failover(&self, topic: &str) -> anyhow::Result<f64> {
        let (_, leader) = self.leaders()?.into_iter().find(|(name, _)| name.ends_with(topic)).context("a leader")?;
        let named = |(name, _): &&(String, u32)| self.id(name).is_ok_and(|id| id == leader);
        let (name, first) = self.pids.iter().find(named).context("a known broker")?;
        // one that was started again has another process
        let again = format!("weir: broker {name} has pid ");
        let log = self.stage.log("weir");
        let pid = log.lines().rev().find_map(|l| l.strip_prefix(&again)?.trim().parse().ok()).unwrap_or(*first);
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(3));
            Command::new("kill").args(["-9", &pid.to_string()]).status()
        });
        let done =
            self.json(&["bench", "verify", "--topic", topic, "--seconds", "8", "--keys", "1", "--rate", "500"])?;
        ensure!(
            killer.join().is_ok_and(|k| k.is_ok_and(|s| s.success())),
            "broker {leader} was not there to be killed"
        );
        done["longest_pause_ms"].as_f64().context("a pause")
    }
}

/// Returns true if all replicas of a topic, as `weir topic describe` gives it, are in sync.
fn is_whole(topic: &Value) -> bool {
    let count = |partition: &Value, field: &str| partition[field].as_array().map_or(0, Vec::len);
    let whole = |partition: &Value| {
        partition["settled"] == true
            && count(partition, "replicas") > 0
            && count(partition, "inSync") == count(partition, "replicas")
    };
    topic["assignment"].as_array().is_some_and(|partitions| !partitions.is_empty() && partitions.iter().all(whole))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_topic_is_whole_once_every_replica_of_every_partition_is_in_sync() {
        let partition =
            |settled: bool, in_sync: &[u64]| json!({"replicas": [1, 2, 3], "settled": settled, "inSync": in_sync});
        let topic = |partitions: Vec<Value>| json!({"name": "default/t", "assignment": partitions});
        assert!(is_whole(&topic(vec![partition(true, &[1, 2, 3]), partition(true, &[1, 2, 3])])));
        for behind in
            [partition(true, &[1, 2]), partition(false, &[1, 2, 3]), json!({"replicas": [1, 2, 3], "settled": true})]
        {
            assert!(!is_whole(&topic(vec![partition(true, &[1, 2, 3]), behind.clone()])), "{behind}");
        }
        assert!(!is_whole(&json!({})) && !is_whole(&topic(Vec::new())));
    }
}
