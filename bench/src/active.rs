//! ActiveMQ: one broker as it comes, driven by its own client.

use crate::run::{Stage, free_port, jars, java, java_client, loopback, result_of};
use crate::{Figures, Load};
use std::path::Path;

const VERSION: &str = "6.1.4";

pub(crate) const SETTINGS: &str = "6.1.4 (Classic), one broker as it comes with a heap of 1 GiB: messages in KahaDB, each answered once it is \
     synced, 8 producers; reads acknowledge each message; publisher to consumer: not persistent; its JMS client (bench/clients/ActiveLoad.java)";

pub(crate) fn figures(cache: &Path, load: &Load) -> anyhow::Result<Figures> {
    let jars_at = cache.join(format!("activemq-{VERSION}"));
    let artifacts = ["activemq-broker", "activemq-kahadb-store"].map(|a| format!("org.apache.activemq:{a}:{VERSION}"));
    jars(&jars_at, &artifacts.each_ref().map(String::as_str))?;
    java_client(&jars_at, "ActiveLoad", include_str!("../clients/ActiveLoad.java"))?;
    let mut stage = Stage::new()?;
    let port = free_port()?;
    let address = format!("tcp://127.0.0.1:{port}");
    let data = stage.folder("data")?;
    stage.start("activemq", java(&jars_at, "-Xmx1G").args(["ActiveLoad", "serve", &address]).arg(data))?;
    stage.until_open("activemq", loopback(port))?;
    let client = |queue: &str, bytes: usize, records: u64, mode: &str| {
        let mut command = java(&jars_at, "-Xmx512m");
        command.args(["ActiveLoad", &address, queue, &bytes.to_string(), &records.to_string(), mode]);
        result_of(&mut command)
    };
    let mut out = Figures::default();
    for (name, bytes, _) in load.sizes() {
        // it takes a few thousand a second: a minute's worth at the others' numbers would be an hour's
        let (queue, records) = (format!("load-{bytes}"), 6 * load.singles);
        out.put(&format!("one {name}"), client(&queue, bytes, records, "sends")?);
        out.put(&format!("read {name}"), client(&queue, bytes, records, "reads")?);
    }
    out.put("to consumer p50 µs", client("delivery", 100, load.singles, "delivery")?);
    out.put("memory MiB", stage.memory_mib());
    Ok(out)
}
