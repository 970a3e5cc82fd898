//! `weir serve`: one broker in this process, or several as processes on loopback, and a folder of manifests applied to them.

use crate::Output;
use crate::admin::{apply_subscription, apply_topic};
use anyhow::Context as _;
use clap::Args;
use std::collections::HashSet;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use weir_broker::config::Config;
use weir_client::Client;
use weir_crds::manifest;

#[derive(Args)]
#[command(after_help = "Examples:
  weir serve --manifests examples --data /tmp/weir
  weir serve --brokers 3 --data /tmp/weir3 -o json")]
pub(crate) struct Serve {
    /// Folder of Topic and Subscription manifests; read again when it changes.
    #[arg(long)]
    manifests: Option<PathBuf>,
    /// Folder of the data; made if missing.
    #[arg(long, default_value = "weir-data")]
    data: PathBuf,
    /// Brokers to run; more than one run as processes of their own.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=9))]
    brokers: u16,
    /// Where clients are served. Peers, administrators: the next two ports; the second broker: ten ports on. Port 0: free ones.
    #[arg(long, default_value = "127.0.0.1:7420")]
    listen: SocketAddr,
    /// Where the first broker's metrics are served; the second one's: the next port.
    #[arg(long, default_value = "127.0.0.1:9464")]
    metrics_listen: SocketAddr,
    /// Do not start a broker process again that ended.
    #[arg(long)]
    no_restart: bool,
}

/// Connections to each listener of a broker.
const CONNECTIONS_MAX: usize = 8_192;

/// Ports of one broker: clients, peers, administrators, metrics.
struct Addresses {
    name: String,
    client: SocketAddr,
    peer: SocketAddr,
    admin: SocketAddr,
    metrics: SocketAddr,
}

fn addresses(serve: &Serve) -> anyhow::Result<Vec<Addresses>> {
    let ip = serve.listen.ip();
    let mut held = Vec::new();
    let mut port = |base: SocketAddr, plus: u16| -> anyhow::Result<SocketAddr> {
        if serve.listen.port() != 0 {
            return Ok(SocketAddr::new(base.ip(), base.port() + plus));
        }
        // found free, and held until all are found
        let listener = TcpListener::bind(SocketAddr::new(ip, 0))?;
        let address = listener.local_addr()?;
        held.push(listener);
        Ok(address)
    };
    let broker = |i: u16| {
        Ok(Addresses {
            name: format!("weir-{i}"),
            client: port(serve.listen, i * 10)?,
            peer: port(serve.listen, i * 10 + 1)?,
            admin: port(serve.listen, i * 10 + 2)?,
            metrics: port(serve.metrics_listen, i)?,
        })
    };
    (0..serve.brokers).map(broker).collect()
}

pub(crate) async fn run(serve: Serve, output: Output) -> anyhow::Result<()> {
    if let Some(folder) = &serve.manifests {
        anyhow::ensure!(folder.is_dir(), "--manifests: {} is not a folder", folder.display());
    }
    weir_broker::logging::start();
    let list = addresses(&serve)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
    };
    let server = list.iter().map(|a| a.client.to_string()).collect::<Vec<_>>().join(",");
    let manifests = serve.manifests.clone();
    let brokers = serve.brokers;
    if serve.brokers == 1 {
        let running = weir_broker::start(config(&serve, &list, 0)).await?;
        running.ready().await;
        print(output, &list, &[std::process::id()]);
        tokio::spawn(feed(server, manifests, brokers));
        stop.await;
        running.stop().await;
        return Ok(());
    }
    let mut children: Vec<Child> = Vec::new();
    for at in 0..list.len() {
        children.push(spawn(&config(&serve, &list, at))?);
    }
    let client = Client::new(&server)?;
    client.connect(Duration::from_secs(30)).await.context("the brokers did not come up")?;
    let ids: Vec<u32> = children.iter().filter_map(Child::id).collect();
    print(output, &list, &ids);
    tokio::spawn(feed(server, manifests, brokers));
    tokio::select! {
        () = stop => {}
        error = supervise(&serve, &list, &mut children) => error?,
    }
    for child in &children {
        if let Some(pid) = child.id() {
            let _ = Command::new("kill").arg("-TERM").arg(pid.to_string()).status().await;
        }
    }
    for child in &mut children {
        let _ = tokio::time::timeout(Duration::from_secs(15), child.wait()).await;
    }
    Ok(())
}

fn config(serve: &Serve, list: &[Addresses], at: usize) -> Config {
    let me = &list[at];
    let many = list.len() > 1;
    Config {
        name: me.name.clone(),
        data: if many { serve.data.join(&me.name) } else { serve.data.clone() },
        client_listen: me.client,
        peer_listen: me.peer,
        admin_listen: me.admin,
        metrics_listen: me.metrics,
        advertise_host: None,
        peers: if many { list.iter().map(|a| format!("{}={}", a.name, a.peer)).collect() } else { Vec::new() },
        cluster_id: String::new(),
        connections_max: CONNECTIONS_MAX,
        rack: String::new(),
    }
}

fn spawn(config: &Config) -> anyhow::Result<Child> {
    let program = std::env::current_exe()?;
    let mut command = Command::new(program);
    command.arg("__broker").arg("--name").arg(&config.name).arg("--data").arg(&config.data);
    command.args(["--client-listen", &config.client_listen.to_string()]);
    command.args(["--peer-listen", &config.peer_listen.to_string()]);
    command.args(["--admin-listen", &config.admin_listen.to_string()]);
    command.args(["--metrics-listen", &config.metrics_listen.to_string()]);
    command.args(["--peers", &config.peers.join(",")]);
    Ok(command.kill_on_drop(true).spawn()?)
}

/// A broker of `weir serve --brokers N`, in a process of its own.
pub(crate) async fn run_broker(config: Config) -> anyhow::Result<()> {
    weir_broker::logging::start();
    let mut terminate = signal(SignalKind::terminate())?;
    // the terminal's interrupt reaches the whole group; the parent says when to stop
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move { while interrupt.recv().await.is_some() {} });
    let running = tokio::select! {
        running = weir_broker::start(config) => running?,
        _ = terminate.recv() => return Ok(()),
    };
    terminate.recv().await;
    running.stop().await;
    Ok(())
}

/// Starts brokers again that ended, a second later.
async fn supervise(serve: &Serve, list: &[Addresses], children: &mut [Child]) -> anyhow::Result<()> {
    loop {
        for (at, child) in children.iter_mut().enumerate() {
            let Some(status) = child.try_wait()? else { continue };
            if serve.no_restart {
                continue;
            }
            eprintln!("weir: broker {} ended ({status}); starting it again", list[at].name);
            tokio::time::sleep(Duration::from_secs(1)).await;
            *child = spawn(&config(serve, list, at))?;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn print(output: Output, list: &[Addresses], pids: &[u32]) {
    let pid = |at: usize| pids.get(at).or(pids.first()).copied().unwrap_or(0);
    if output == Output::Json {
        let broker = |(at, a): (usize, &Addresses)| {
            serde_json::json!({"id": at + 1, "name": a.name, "pid": pid(at), "client": a.client.to_string(),
                "peer": a.peer.to_string(), "admin": a.admin.to_string(), "metrics": a.metrics.to_string()})
        };
        let brokers: Vec<_> = list.iter().enumerate().map(broker).collect();
        println!("{}", serde_json::json!({"brokers": brokers}));
        return;
    }
    for (at, a) in list.iter().enumerate() {
        let Addresses { name, client, admin, metrics, .. } = a;
        println!(
            "broker {} ({name}, pid {}): clients {client}, admin {admin}, metrics http://{metrics}/metrics",
            at + 1,
            pid(at)
        );
    }
}

/// Applies the manifests, and again whenever their text changes.
async fn feed(server: String, folder: Option<PathBuf>, brokers: u16) {
    let Some(folder) = folder else { return };
    let mut applied: HashSet<String> = HashSet::new();
    let mut said = Vec::new();
    let mut failed = String::new();
    loop {
        let outcome = apply_folder(&server, &folder, brokers, &mut applied, &mut said).await;
        let now_failed = outcome.err().map_or(String::new(), |error| format!("{error:#}"));
        // told once it is so for two looks: brokers that have just started need a moment
        if !now_failed.is_empty() && now_failed == failed {
            eprintln!("weir: {}: {now_failed}", folder.display());
        }
        failed = now_failed;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn apply_folder(
    server: &str,
    folder: &Path,
    brokers: u16,
    applied: &mut HashSet<String>,
    said: &mut Vec<manifest::ManifestError>,
) -> anyhow::Result<()> {
    let (declared, errors) = manifest::read_folder(folder)?;
    if errors != *said {
        errors.iter().for_each(|e| eprintln!("weir: {e}"));
        *said = errors;
    }
    let client = Client::new(server)?;
    for mut topic in declared.topics {
        // fewer brokers than replicas: as many as there are, or nothing could be tried on a laptop
        topic.replicas = topic.replicas.min(brokers.into());
        if !applied.contains(&format!("{topic:?}")) {
            apply_topic(&client, &topic).await.with_context(|| format!("topic {}", topic.name))?;
            applied.insert(format!("{topic:?}"));
        }
    }
    for subscription in declared.subscriptions {
        if !applied.contains(&format!("{subscription:?}")) {
            apply_subscription(&client, &subscription)
                .await
                .with_context(|| format!("subscription {}", subscription.name))?;
            applied.insert(format!("{subscription:?}"));
        }
    }
    Ok(())
}
