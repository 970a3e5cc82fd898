//! Kafka: three brokers by KRaft, driven by its own tools.

use crate::run::{Stage, free_port, jars, java, loopback, number_after, number_before, run};
use crate::{Figures, Load};
use anyhow::Context as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const VERSION: &str = "4.3.1";
const BROKERS: usize = 3;

pub(crate) const SETTINGS: &str = "4.3.1, three brokers by KRaft with a heap of 1 GiB each, 6 partitions, three replicas, acks=all (in \
    memory of all in sync: Kafka does not sync), linger 5 ms, batches of 128 KiB; its ProducerPerformance, ConsumerPerformance and EndToEndLatency";

struct Kafka {
    stage: Stage,
    jars: PathBuf,
    servers: String,
}

pub(crate) fn figures(cache: &Path, load: &Load) -> anyhow::Result<Figures> {
    let jars_at = cache.join(format!("kafka-{VERSION}"));
    let artifacts = ["kafka_2.13", "kafka-tools"].map(|a| format!("org.apache.kafka:{a}:{VERSION}"));
    jars(&jars_at, &artifacts.each_ref().map(String::as_str))?;
    let kafka = start(jars_at)?;
    let mut out = Figures::default();
    for (name, bytes, records) in load.sizes() {
        let topic = format!("three-{bytes}");
        kafka.topic(&topic, 6, 3)?;
        kafka.produce(&topic, bytes, records / 10)?; // what is just in time is compiled by then
        out.put(&format!("three {name}"), kafka.produce(&topic, bytes, records)?);
        out.put(&format!("read {name}"), kafka.consume(&topic, records)?);
    }
    kafka.topic("latency", 1, 3)?;
    out.put("latency three p50 µs", kafka.latency("latency", load.singles)?);
    for (name, bytes, records) in load.sizes() {
        let topic = format!("one-{bytes}");
        kafka.topic(&topic, 1, 1)?;
        out.put(&format!("one {name}"), kafka.produce(&topic, bytes, records)?);
    }
    out.put("memory MiB", kafka.stage.memory_mib());
    out.put("leader killed ms", kafka.failover("latency")?);
    Ok(out)
}

fn start(jars: PathBuf) -> anyhow::Result<Kafka> {
    let mut stage = Stage::new()?;
    let ports: Vec<(u16, u16)> =
        (0..BROKERS).map(|_| Ok((free_port()?, free_port()?))).collect::<anyhow::Result<_>>()?;
    let voters: Vec<String> =
        ports.iter().enumerate().map(|(i, (_, control))| format!("{}@127.0.0.1:{control}", i + 1)).collect();
    for (i, (clients, control)) in ports.iter().enumerate() {
        let data = stage.folder(&format!("data-{i}"))?;
        let text = format!(
            "process.roles=broker,controller\nnode.id={}\ncontroller.quorum.voters={}\n\
             listeners=PLAINTEXT://127.0.0.1:{clients},CONTROLLER://127.0.0.1:{control}\ncontroller.listener.names=CONTROLLER\n\
             log.dirs={}\noffsets.topic.replication.factor=3\ntransaction.state.log.replication.factor=3\n\
             min.insync.replicas=2\ngroup.initial.rebalance.delay.ms=0\n",
            i + 1,
            voters.join(","),
            data.display()
        );
        let config = stage.file(&format!("server-{i}.properties"), &text)?;
        let mut format = java(&jars, "-Xmx256m");
        format.args(["kafka.tools.StorageTool", "format", "-t", "d0nXLJDnTSyI3mm5YQZpdA", "-c"]).arg(&config);
        run(&mut format)?;
        stage.start(&format!("kafka-{i}"), java(&jars, "-Xmx1G").args(["-Xms1G", "kafka.Kafka"]).arg(&config))?;
    }
    for (i, (clients, _)) in ports.iter().enumerate() {
        stage.until_open(&format!("kafka-{i}"), loopback(*clients))?;
    }
    let servers = ports.iter().map(|(clients, _)| format!("127.0.0.1:{clients}")).collect::<Vec<_>>().join(",");
    Ok(Kafka { stage, jars, servers })
}

impl Kafka {
    fn tool(&self, class: &str) -> Command {
        let mut command = java(&self.jars, "-Xmx512m");
        command.arg(format!("org.apache.kafka.tools.{class}"));
        command
    }

    fn topic(&self, name: &str, partitions: u32, replicas: u32) -> anyhow::Result<()> {
        let mut command = self.tool("TopicCommand");
        command.args(["--bootstrap-server", &self.servers, "--create", "--topic", name]);
        run(command.args(["--partitions", &partitions.to_string(), "--replication-factor", &replicas.to_string()]))?;
        Ok(())
    }

    /// Records a second.
    fn produce(&self, topic: &str, bytes: usize, records: u64) -> anyhow::Result<f64> {
        let mut command = self.tool("ProducerPerformance");
        command.args(["--topic", topic, "--num-records", &records.to_string(), "--record-size", &bytes.to_string()]);
        command.args(["--throughput", "-1", "--producer-props", &format!("bootstrap.servers={}", self.servers)]);
        let text = run(command.args(["acks=all", "linger.ms=5", "batch.size=131072"]))?;
        let line = text.lines().rfind(|l| l.contains("records/sec") && l.contains("99.9th")).unwrap_or_default();
        number_before(line, " records/sec").with_context(|| format!("no rate in: {text}"))
    }

    fn consume(&self, topic: &str, records: u64) -> anyhow::Result<f64> {
        let mut command = self.tool("ConsumerPerformance");
        command.args(["--bootstrap-server", &self.servers, "--topic", topic, "--num-records", &records.to_string()]);
        let text = run(command.args(["--timeout", "60000"]))?;
        // the columns end with: data, MB/s, records, records/s, rebalance ms, fetch ms, fetch MB/s, fetch records/s
        let line = text.lines().rfind(|l| l.split(", ").count() >= 10).unwrap_or_default();
        let last = line.split(", ").last().and_then(|n| n.trim().parse().ok());
        last.with_context(|| format!("no rate in: {text}"))
    }

    /// From a record's publishing to its consumer, µs, median.
    fn latency(&self, topic: &str, records: u64) -> anyhow::Result<f64> {
        let mut command = self.tool("EndToEndLatency");
        command.args(["--bootstrap-server", &self.servers, "--topic", topic, "--num-records", &records.to_string()]);
        let text = run(command.args(["--producer-acks", "all", "--record-size", "100"]))?;
        let ms = number_after(&text, "50th = ").with_context(|| format!("no latency in: {text}"))?;
        Ok(ms * 1_000.0)
    }

    /// Kills the leader of a topic's partition while it is published to; the longest wait for an acknowledgement, ms.
    fn failover(&self, topic: &str) -> anyhow::Result<f64> {
        let mut command = self.tool("TopicCommand");
        let text = run(command.args(["--bootstrap-server", &self.servers, "--describe", "--topic", topic]))?;
        let leader = number_after(&text, "Leader: ").with_context(|| format!("no leader in: {text}"))? as usize;
        let pid = self.stage.pid(&format!("kafka-{}", leader - 1)).context("a broker that runs")?;
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(8)); // by then the producer's JVM is warm
            Command::new("kill").args(["-9", &pid.to_string()]).status()
        });
        let mut command = self.tool("VerifiableProducer");
        command.args(["--bootstrap-server", &self.servers, "--topic", topic, "--throughput", "500", "--acks", "-1"]);
        let text = run(command.args(["--max-messages", "15000"]))?;
        let _ = killer.join();
        let acked = text.lines().filter(|l| l.contains("producer_send_success"));
        let at: Vec<f64> = acked.filter_map(|l| number_after(l, "\"timestamp\":")).collect();
        at.windows(2).map(|pair| pair[1] - pair[0]).reduce(f64::max).context("no acknowledgements")
    }
}
