//! Weir: three brokers and one, as `weir serve` runs them, driven by `weir bench`.

use crate::run::{Stage, run};
use crate::{Figures, Load};
use anyhow::{Context as _, ensure};
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

pub(crate) const SETTINGS: &str = "this commit, three brokers, 6 partitions, three replicas, each acknowledged when a majority has synced it; \
    as it comes (linger 5 ms, batches of 256 KiB); `weir bench`. After each run the number of records read is held against the number \
    acknowledged, and the offsets acknowledged must have no gap";

struct Weir<'a> {
    program: &'a Path,
    stage: Stage,
    servers: String,
}

fn topic(name: &str, partitions: u32, replicas: u32, durability: &str) -> String {
    format!(
        "apiVersion: weir.dev/v1alpha1\nkind: Topic\nmetadata: {{name: {name}}}\nspec: {{partitions: {partitions}, replicas: {replicas}, \
         durability: {durability}}}\n---\n"
    )
}

pub(crate) fn figures(program: &Path, load: &Load) -> anyhow::Result<Figures> {
    let mut out = Figures::default();
    {
        let topics: Vec<String> =
            load.sizes().iter().map(|(_, bytes, _)| topic(&format!("load-{bytes}"), 6, 3, "quorumSync")).collect();
        let weir = start(
            program,
            3,
            topics.concat() + &topic("latency", 1, 3, "quorumSync") + &topic("memory", 1, 3, "quorumMemory"),
        )?;
        for (name, bytes, records) in load.sizes() {
            let topic = format!("load-{bytes}");
            out.put(&format!("three {name}"), weir.produce(&topic, bytes, records)?);
            weir.consume(&topic, records)?;
        }
        out.put("latency three p50 µs", weir.latency("latency", load.singles, "acked")?);
        out.put("latency three, memory p50 µs", weir.latency("memory", load.singles, "acked")?);
        out.put("memory MiB", weir.stage.memory_mib());
    }
    let topics: Vec<String> =
        load.sizes().iter().map(|(_, bytes, _)| topic(&format!("load-{bytes}"), 6, 1, "quorumSync")).collect();
    let weir = start(program, 1, topics.concat() + &topic("memory", 1, 1, "quorumMemory"))?;
    for (name, bytes, records) in load.sizes() {
        let topic = format!("load-{bytes}");
        out.put(&format!("one {name}"), weir.produce(&topic, bytes, records)?);
        out.put(&format!("read {name}"), weir.consume(&topic, records)?);
    }
    out.put("to consumer p50 µs", weir.latency("memory", load.singles, "read")?);
    Ok(out)
}

fn start(program: &Path, brokers: u32, topics: String) -> anyhow::Result<Weir<'_>> {
    let mut stage = Stage::new()?;
    let manifests = stage.folder("manifests")?;
    std::fs::write(manifests.join("topics.yaml"), &topics)?;
    let mut serve = Command::new(program);
    serve.args(["serve", "-o", "json", "--brokers", &brokers.to_string(), "--listen", "127.0.0.1:0"]);
    serve.args(["--metrics-listen", "127.0.0.1:0"]).arg("--manifests").arg(manifests);
    serve.arg("--data").arg(stage.folder("data")?);
    stage.start("weir", &mut serve)?;
    let begun = Instant::now();
    let described = loop {
        let log = stage.log("weir");
        if let Some(line) = log.lines().find(|l| l.starts_with("{\"brokers\"")) {
            break serde_json::from_str::<Value>(line)?;
        }
        ensure!(begun.elapsed() < Duration::from_secs(60), "weir serve does not come up:\n{log}");
        std::thread::sleep(Duration::from_millis(50));
    };
    let brokers = described["brokers"].as_array().context("brokers")?;
    let servers = brokers.iter().filter_map(|b| b["client"].as_str()).collect::<Vec<_>>().join(",");
    let weir = Weir { program, stage, servers };
    let wanted = topics.matches("kind: Topic").count();
    // all topics are there, and led
    loop {
        let listed = weir.json(&["topic", "list"]).ok();
        let led = |t: &Value| t["partitions"].as_array().is_none_or(|all| all.iter().all(|p| p["leader"] != 0));
        if listed.is_some_and(|l| l.as_array().is_some_and(|all| all.len() == wanted && all.iter().all(led))) {
            return Ok(weir);
        }
        ensure!(begun.elapsed() < Duration::from_secs(60), "the topics do not come up:\n{}", weir.stage.log("weir"));
        std::thread::sleep(Duration::from_millis(200));
    }
}

impl Weir<'_> {
    fn json(&self, args: &[&str]) -> anyhow::Result<Value> {
        let text = run(Command::new(self.program).args(["--server", &self.servers, "-o", "json"]).args(args))?;
        let line = text.lines().find(|l| l.starts_with(['{', '['])).with_context(|| format!("no JSON in: {text}"))?;
        Ok(serde_json::from_str(line)?)
    }

    fn produce(&self, topic: &str, bytes: usize, records: u64) -> anyhow::Result<f64> {
        let (bytes, records) = (bytes.to_string(), records.to_string());
        let done = self.json(&["bench", "produce", "--topic", topic, "--records", &records, "--size", &bytes])?;
        ensure!(done["gaps"] == 0, "offsets of {topic} that nobody was told of: {done}");
        done["records_per_second"].as_f64().context("a rate")
    }

    fn consume(&self, topic: &str, records: u64) -> anyhow::Result<f64> {
        let done = self.json(&["bench", "consume", "--topic", topic, "--records", &records.to_string()])?;
        ensure!(done["records"] == records, "{records} records of {topic} were acknowledged: {done}");
        done["records_per_second"].as_f64().context("a rate")
    }

    fn latency(&self, topic: &str, records: u64, until: &str) -> anyhow::Result<f64> {
        let done =
            self.json(&["bench", "latency", "--topic", topic, "--records", &records.to_string(), "--until", until])?;
        done["latency_us"]["p50"].as_f64().context("a latency")
    }
}
