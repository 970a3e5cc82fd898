//! RocketMQ: a name server and one broker, driven by its own client.

use crate::run::{Stage, free_port, jars, java, java_client, loopback, result_of};
use crate::{Figures, Load};
use std::path::Path;
use std::process::Command;

const VERSION: &str = "5.3.3";
/// What its scripts open of the JVM's insides.
const OPENED: [&str; 3] = [
    "--add-opens=java.base/java.nio=ALL-UNNAMED",
    "--add-exports=java.base/sun.nio.ch=ALL-UNNAMED",
    "--add-opens=java.base/sun.nio.ch=ALL-UNNAMED",
];

pub(crate) const SETTINGS: &str = "5.3.3, a name server and one broker with a heap of 1 GiB, asynchronous flush (an acknowledged message is not on \
     disk yet); batches of 500 from 4 threads; *singles*: one by one from 32 threads; its client (bench/clients/RocketLoad.java)";

pub(crate) fn figures(cache: &Path, load: &Load) -> anyhow::Result<Figures> {
    let jars_at = cache.join(format!("rocketmq-{VERSION}"));
    let artifacts = ["rocketmq-broker", "rocketmq-namesrv"].map(|a| format!("org.apache.rocketmq:{a}:{VERSION}"));
    jars(&jars_at, &artifacts.each_ref().map(String::as_str))?;
    java_client(&jars_at, "RocketLoad", include_str!("../clients/RocketLoad.java"))?;
    let mut stage = Stage::new()?;
    let (names, broker, replicas) = (free_port()?, free_port()?, free_port()?);
    let (home, store) = (stage.folder("home")?, stage.folder("store")?);
    let program = |heap: &str| -> Command {
        let mut command = java(&jars_at, heap);
        command.args(OPENED).arg(format!("-Duser.home={}", home.display())).env("ROCKETMQ_HOME", &home);
        command
    };
    let config = stage.file("names.conf", &format!("listenPort={names}\n"))?;
    let mut server = program("-Xmx256m");
    stage.start("names", server.args(["org.apache.rocketmq.namesrv.NamesrvStartup", "-c"]).arg(config))?;
    stage.until_open("names", loopback(names))?;
    let text = format!(
        "brokerClusterName=bench\nbrokerName=b\nbrokerId=0\nnamesrvAddr=127.0.0.1:{names}\nbrokerIP1=127.0.0.1\nlistenPort={broker}\n\
         haListenPort={replicas}\nstorePathRootDir={0}\nstorePathCommitLog={0}/commitlog\nautoCreateTopicEnable=true\n\
         flushDiskType=ASYNC_FLUSH\n",
        store.display()
    );
    let config = stage.file("broker.conf", &text)?;
    let mut server = program("-Xmx1G");
    stage.start("broker", server.args(["-Xms1G", "org.apache.rocketmq.broker.BrokerStartup", "-c"]).arg(config))?;
    stage.until_open("broker", loopback(broker))?;
    std::thread::sleep(std::time::Duration::from_secs(3)); // it tells the name server of itself
    let servers = format!("127.0.0.1:{names}");
    let client = |topic: &str, bytes: usize, records: u64, mode: &str| {
        let mut command = program("-Xmx512m");
        command.args(["RocketLoad", &servers, topic, &bytes.to_string(), &records.to_string(), mode]);
        result_of(&mut command)
    };
    let mut out = Figures::default();
    for (name, bytes, records) in load.sizes() {
        let topic = format!("load-{bytes}");
        out.put(&format!("one {name}"), client(&topic, bytes, records / 2, "batches")?);
        out.put(&format!("read {name}"), client(&topic, bytes, records / 2, "reads")?);
        out.put(&format!("one {name}, singles"), client("singles", bytes, 20 * load.singles, "singles")?);
    }
    out.put("latency one, memory p50 µs", client("latency", 100, load.singles, "latency")?);
    out.put("memory MiB", stage.memory_mib());
    Ok(out)
}
