//! NATS JetStream: three servers, driven by its command line's benchmark.

use crate::run::{Stage, free_port, loopback, number_before, run};
use crate::{Figures, Load};
use anyhow::Context as _;
use std::path::{Path, PathBuf};
use std::process::Command;

const SERVER: &str = "github.com/nats-io/nats-server/v2@v2.15.2";
const CLIENT: &str = "github.com/nats-io/natscli/nats@v0.5.1";
const SERVERS: usize = 3;

pub(crate) const SETTINGS: &str = "server 2.15.2, three servers, a stream with three replicas in files (synced every two minutes, as it comes), published \
     asynchronously in batches of 500 acknowledgements; `nats bench`";

/// The programs, built once by Go.
fn build(cache: &Path) -> anyhow::Result<PathBuf> {
    let bin = cache.join("nats-2.15.2");
    for (module, name) in [(SERVER, "nats-server"), (CLIENT, "nats")] {
        if !bin.join(name).exists() {
            run(Command::new("go").args(["install", module]).env("GOBIN", &bin).env("GOFLAGS", ""))?;
        }
    }
    Ok(bin)
}

pub(crate) fn figures(cache: &Path, load: &Load) -> anyhow::Result<Figures> {
    let bin = build(cache)?;
    let mut stage = Stage::new()?;
    let ports: Vec<(u16, u16)> =
        (0..SERVERS).map(|_| Ok((free_port()?, free_port()?))).collect::<anyhow::Result<_>>()?;
    let routes: Vec<String> = ports.iter().map(|(_, peer)| format!("nats://127.0.0.1:{peer}")).collect();
    for (i, (clients, peers)) in ports.iter().enumerate() {
        let data = stage.folder(&format!("data-{i}"))?;
        let text = format!(
            "listen: 127.0.0.1:{clients}\nserver_name: n{i}\njetstream {{store_dir: \"{}\", max_file: 100GB}}\n\
             cluster {{name: bench, listen: 127.0.0.1:{peers}, routes: [{}]}}\n",
            data.display(),
            routes.join(",")
        );
        let config = stage.file(&format!("n{i}.conf"), &text)?;
        stage.start(&format!("nats-{i}"), Command::new(bin.join("nats-server")).arg("-c").arg(config))?;
    }
    for (i, (clients, _)) in ports.iter().enumerate() {
        stage.until_open(&format!("nats-{i}"), loopback(*clients))?;
    }
    let server = format!("nats://127.0.0.1:{}", ports[0].0);
    std::thread::sleep(std::time::Duration::from_secs(3)); // the metadata's leader is chosen
    let bench = |what: &[&str], stream: &str, bytes: usize, records: u64| -> anyhow::Result<String> {
        let mut command = Command::new(bin.join("nats"));
        command.args(["--server", &server, "bench", "js"]).args(what);
        command.args([
            "--stream",
            stream,
            "--size",
            &bytes.to_string(),
            "--msgs",
            &records.to_string(),
            "--no-progress",
        ]);
        run(command
            .args(["--replicas", "3", "--storage", "file", "--create", "--purge"])
            .arg(format!("{stream}.subject")))
    };
    let rate = |text: String| number_before(&text, " msgs/sec").with_context(|| format!("no rate in: {text}"));
    let mut out = Figures::default();
    for (name, bytes, records) in load.sizes() {
        let stream = format!("three{bytes}");
        out.put(
            &format!("three {name}"),
            rate(bench(&["pub", "async", "--batch", "500"], &stream, bytes, records / 5)?)?,
        );
    }
    let sync = rate(bench(&["pub", "sync"], "latency", 100, load.singles)?)?;
    out.put("latency three p50 µs", 1e6 / sync); // the mean: it prints no quantiles
    out.put("memory MiB", stage.memory_mib());
    Ok(out)
}
