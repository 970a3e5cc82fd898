//! `weir serve`: one broker in this process, or several as processes on loopback, and a folder of manifests applied to them.

use crate::Output;
use crate::admin::{apply_subscription, apply_topic};
use anyhow::Context as _;
use clap::Args;
use std::collections::{BTreeSet, HashMap};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::time::Duration;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use weir_broker::config::Config;
use weir_client::Client;
use weir_crds::manifest::{self, Declared};

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
    /// A Unix socket on which clients are served too (one broker only); `--server unix:PATH` reaches it.
    #[arg(long, conflicts_with = "brokers")]
    socket: Option<PathBuf>,
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
        print(output, &list, &[std::process::id()], &[(list[0].name.clone(), running.broker.0)]);
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
    let cluster = client.connect(Duration::from_secs(30)).await.context("the brokers did not come up")?;
    let pids: Vec<u32> = children.iter().filter_map(Child::id).collect();
    let ids: Vec<(String, u64)> = cluster.metadata.brokers.iter().map(|b| (b.name.clone(), b.id)).collect();
    print(output, &list, &pids, &ids);
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
        client_socket: serve.socket.clone().filter(|_| !many),
        inproc: false,
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
            eprintln!("weir: broker {} has pid {}", list[at].name, child.id().unwrap_or(0));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn print(output: Output, list: &[Addresses], pids: &[u32], ids: &[(String, u64)]) {
    let pid = |at: usize| pids.get(at).or(pids.first()).copied().unwrap_or(0);
    // 0 for one that has not joined yet
    let id = |name: &str| ids.iter().find(|(n, _)| n == name).map_or(0, |(_, id)| *id);
    if output == Output::Json {
        let broker = |(at, a): (usize, &Addresses)| {
            serde_json::json!({"id": id(&a.name), "name": a.name, "pid": pid(at), "client": a.client.to_string(),
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
            id(name),
            pid(at)
        );
    }
}

/// Applies the manifests, and again whenever their text changes.
async fn feed(server: String, folder: Option<PathBuf>, brokers: u16) {
    let Some(folder) = folder else { return };
    let mut feed = Feed { folder, brokers, applied: HashMap::new(), said: BTreeSet::new() };
    loop {
        feed.look(&server).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// What was made of a folder of manifests.
struct Feed {
    folder: PathBuf,
    brokers: u16,
    /// by kind and name: what was last applied
    applied: HashMap<String, String>,
    /// what was wrong at the last look, and told
    said: BTreeSet<String>,
}

impl Feed {
    /// Applies what has changed; what is wrong with one resource leaves the others alone, and is told once.
    async fn look(&mut self, server: &str) {
        let wrong = match manifest::read_folder(&self.folder) {
            Ok((declared, errors)) => {
                let mut wrong: BTreeSet<String> = errors.iter().map(ToString::to_string).collect();
                match Client::new(server) {
                    Ok(client) => self.apply(&client, declared, &mut wrong).await,
                    Err(error) => drop(wrong.insert(error.to_string())),
                }
                wrong
            }
            Err(error) => BTreeSet::from([format!("{}: {error}", self.folder.display())]),
        };
        wrong.difference(&self.said).for_each(|text| eprintln!("weir: {text}"));
        self.said = wrong;
    }

    async fn apply(&mut self, client: &Client, declared: Declared, wrong: &mut BTreeSet<String>) {
        let Declared { topics, subscriptions, origins } = declared;
        let mut refused = |what: &str, error: anyhow::Error| {
            // brokers that have just started have no leader for a moment: the next look tries again
            if !is_passing(&error) {
                let at = origins.get(what).map_or(String::new(), |(file, line)| format!("{}:{line}: ", file.display()));
                wrong.insert(format!("{at}{what}: {error:#}"));
            }
        };
        for mut topic in topics {
            // fewer brokers than replicas: as many as there are, or nothing could be tried on a laptop
            topic.replicas = topic.replicas.min(self.brokers.into());
            let (what, text) = (format!("topic {}", topic.name), format!("{topic:?}"));
            if self.applied.get(&what) != Some(&text) {
                match apply_topic(client, &topic).await {
                    Ok(()) => drop(self.applied.insert(what, text)),
                    Err(error) => refused(&what, error),
                }
            }
        }
        for subscription in subscriptions {
            let (what, text) = (format!("subscription {}", subscription.name), format!("{subscription:?}"));
            if self.applied.get(&what) != Some(&text) {
                match apply_subscription(client, &subscription).await {
                    Ok(()) => drop(self.applied.insert(what, text)),
                    Err(error) => refused(&what, error),
                }
            }
        }
    }
}

fn is_passing(error: &anyhow::Error) -> bool {
    error.downcast_ref::<weir_client::Error>().is_some_and(weir_client::Error::is_unavailable)
}
