//! RabbitMQ: Debian's package, one node with a quorum queue, driven by its PerfTest.

use crate::run::{Stage, free_port, jars, java, loopback, number_after, run};
use crate::{Figures, Load};
use anyhow::Context as _;
use std::path::Path;
use std::process::Command;

const PERF_TEST: &str = "com.rabbitmq:perf-test:2.22.1";

pub(crate) const SETTINGS: &str = "Debian's package, one node, a quorum queue with publisher confirms (500 outstanding, 8 publishers); publisher to consumer: a \
     transient queue; its PerfTest 2.22.1";

pub(crate) fn figures(cache: &Path, load: &Load) -> anyhow::Result<Figures> {
    let jars_at = cache.join("perf-test-2.22.1");
    jars(&jars_at, &[PERF_TEST])?;
    let mut stage = Stage::new()?;
    let (port, epmd, dist) = (free_port()?, free_port()?, free_port()?);
    let home = stage.folder("home")?;
    let plugins = stage.file("plugins", "[].")?;
    let mut server = Command::new("/usr/lib/rabbitmq/bin/rabbitmq-server");
    server
        .env("RABBITMQ_NODENAME", format!("bench{port}@localhost"))
        .env("RABBITMQ_MNESIA_BASE", home.join("db"))
        .env("RABBITMQ_LOG_BASE", home.join("log"))
        .env("RABBITMQ_NODE_PORT", port.to_string())
        .env("RABBITMQ_DIST_PORT", dist.to_string())
        .env("ERL_EPMD_PORT", epmd.to_string())
        .env("RABBITMQ_PID_FILE", home.join("pid"))
        .env("RABBITMQ_ENABLED_PLUGINS_FILE", plugins)
        .env("HOME", &home);
    stage.start("rabbitmq", &mut server)?;
    stage.until_open("rabbitmq", loopback(port))?;
    let test = |args: &[&str]| {
        let mut command = java(&jars_at, "-Xmx512m");
        command.arg("com.rabbitmq.perf.PerfTest").args(["-h", &format!("amqp://guest:guest@127.0.0.1:{port}")]);
        run(command.args(args))
    };
    let mut out = Figures::default();
    for (name, bytes, records) in load.sizes() {
        let (each, queue) = ((records / 40).to_string(), format!("load-{bytes}"));
        let fixed = ["--quorum-queue", "-x", "8", "-y", "0", "-c", "500", "-s"];
        let text = test(&[&fixed[..], &[&bytes.to_string(), "-u", &queue, "-C", &each]].concat())?;
        let rate = number_after(&text, "sending rate avg:").with_context(|| format!("no rate in: {text}"))?;
        out.put(&format!("one {name}"), rate);
    }
    let text = test(&["-x", "1", "-y", "1", "-a", "-r", "1000", "-s", "100", "-z", "8", "-u", "transient", "-f", ""])?;
    // min/median/75th/95th/99th: the median is the second
    let line = text.lines().rfind(|l| l.contains("consumer latency")).unwrap_or_default();
    let median = line.split('/').nth(5).and_then(|n| n.split_whitespace().next()?.parse::<f64>().ok());
    if let Some(median) = median {
        out.put("to consumer p50 µs", median);
    }
    out.put("memory MiB", stage.memory_mib());
    Ok(out)
}
