//! `weir serve`: one broker in this process, or several as processes on loopback, and a folder of manifests applied to them.

use crate::admin::{apply_subscription, apply_topic};
use crate::{Output, usage};
use anyhow::Context as _;
use clap::{Args, Parser as _};
use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::{Child, ChildStdin, Command};
use tokio::signal::unix::{SignalKind, signal};
use weir_broker::config::{self, Config};
use weir_broker::outln;
use weir_broker::output::{Unwritten, note};
use weir_client::Client;
use weir_crds::manifest::{self, Declared};

#[derive(Args)]
#[command(after_help = "Examples:
  weir serve --manifests examples --data /tmp/weir
  weir serve --brokers 3 --data /tmp/weir3 -o json
  weir serve --listen 0.0.0.0:7420 --advertise-host laptop.example.com
A line on standard output, with -o json one JSON value, says when it serves.")]
pub(crate) struct Serve {
    /// Folder of Topic and Subscription manifests; read again when it changes.
    #[arg(long)]
    manifests: Option<PathBuf>,
    /// Folder of the data; made if missing. One `weir serve` at a time uses it.
    #[arg(long, default_value = "weir-data")]
    data: PathBuf,
    /// Brokers to run; more than one run as processes of their own, which end with this one.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=9), allow_hyphen_values = true)]
    brokers: u16,
    /// Where clients are served. Peers, administrators: the next two ports; the second broker: ten ports on. Port 0: free ones.
    #[arg(long, default_value = "127.0.0.1:7420", value_parser = config::listen_address, allow_hyphen_values = true)]
    listen: SocketAddr,
    /// Where the first broker's metrics are served; the second one's: the next port. Port 0: free ones. Default: 127.0.0.1:9464,
    /// or free ports where --listen has port 0.
    #[arg(long, value_parser = config::listen_address, allow_hyphen_values = true)]
    metrics_listen: Option<SocketAddr>,
    /// Host, without a port, by which clients, and the brokers each other, reach this machine. Required where --listen names none,
    /// such as 0.0.0.0.
    #[arg(long, value_parser = config::host)]
    advertise_host: Option<String>,
    /// A Unix socket on which clients are served too (one broker only); `--server unix:PATH` reaches it.
    #[arg(long, conflicts_with = "brokers")]
    socket: Option<PathBuf>,
    /// Do not start a broker process again that ended.
    #[arg(long)]
    no_restart: bool,
    /// Goes on without acknowledged records that are lost: the write that the error of a start names. Of no effect at any other loss.
    #[arg(long, env = "WEIR_ACCEPT_LOSS", value_name = "WRITE")]
    accept_loss: Option<u64>,
}

/// First argument of a broker process that `weir serve` starts.
pub(crate) const BROKER: &str = "__broker";
/// Argument of a broker process whose standard input is a pipe of its parent: it ends with it.
const WITH_PARENT: &str = "--with-parent";
/// Connections to each listener of a broker.
const CONNECTIONS_MAX: usize = 8_192;
/// Range of the ports that are chosen for port 0. It lies below the ephemeral ports, so that no outgoing connection takes the port of a
/// broker while it is restarted.
const FREE_PORTS: Range<u16> = 10_000..32_768;
/// Attempts to find a free port in this range; after that the system chooses an ephemeral one.
const FREE_TRIES: u32 = 1_000;
/// Where metrics are served by default.
const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9464);
/// A cluster whose brokers all run answers within this time; a store that is large takes a while to open.
const ANSWERS_WITHIN: Duration = Duration::from_secs(60);
/// Starts of each broker before the first answer of any, after which something is wrong that no start mends.
const STARTS_MAX: u32 = 3;
/// What an earlier process held, a folder and ports, is free within this time: its brokers end with it, moments later.
const FREE_WITHIN: Duration = Duration::from_secs(2);
/// A broker that was told to end does so within this time.
const ENDS_WITHIN: Duration = Duration::from_secs(15);

/// Ports of one broker: clients, peers, administrators, metrics.
struct Addresses {
    name: String,
    client: SocketAddr,
    peer: SocketAddr,
    admin: SocketAddr,
    metrics: SocketAddr,
}

/// What `take` gives, asked again while it says that this is in use, until `end`.
fn once_free<T>(
    end: Instant,
    in_use: impl Fn(&std::io::Error) -> bool,
    take: impl Fn() -> std::io::Result<T>,
) -> std::io::Result<T> {
    loop {
        match take() {
            Err(error) if in_use(&error) && Instant::now() < end => std::thread::sleep(Duration::from_millis(20)),
            taken => return taken,
        }
    }
}

/// The ports that are taken, each held until all are known: one in use is an error here, before anything runs.
struct Ports {
    taken: Vec<TcpListener>,
    /// until when one in use may become free
    end: Instant,
}

impl Ports {
    /// Takes a free port, outside the ephemeral ports if possible.
    fn take_free(&mut self, ip: IpAddr) -> std::io::Result<SocketAddr> {
        let bind = |port| TcpListener::bind(SocketAddr::new(ip, port));
        let in_use = |tried: &std::io::Result<_>| tried.as_ref().is_err_and(|e| e.kind() == ErrorKind::AddrInUse);
        let free = (0..FREE_TRIES).map(|_| bind(fastrand::u16(FREE_PORTS))).find(|tried| !in_use(tried));
        let listener = free.unwrap_or_else(|| bind(0))?;
        let bound = listener.local_addr()?;
        self.taken.push(listener);
        Ok(bound)
    }

    /// The port `plus` behind an argument's, or a free one where that is 0.
    fn take(&mut self, flag: &str, base: SocketAddr, plus: u16, what: &str) -> anyhow::Result<SocketAddr> {
        if base.port() == 0 {
            return self.take_free(base.ip()).with_context(|| format!("cannot listen on {base} for {what}"));
        }
        let Some(port) = base.port().checked_add(plus) else {
            let wanted = u32::from(base.port()) + u32::from(plus);
            return Err(usage(format!(
                "{flag} {base}: {what} would have port {wanted}, and ports end at 65535; use a smaller one"
            )));
        };
        let at = SocketAddr::new(base.ip(), port);
        let ours = |l: &TcpListener| l.local_addr().is_ok_and(|bound| bound.port() == port);
        if self.taken.iter().any(ours) {
            return Err(usage(format!(
                "--listen and --metrics-listen overlap: {what} would have port {port}, which another one has"
            )));
        }
        let listener = once_free(self.end, |e| e.kind() == ErrorKind::AddrInUse, || TcpListener::bind(at));
        let listener =
            listener.with_context(|| format!("cannot listen on {at} for {what}; choose another with {flag}"))?;
        let bound = listener.local_addr()?;
        self.taken.push(listener);
        Ok(bound)
    }
}

fn addresses(serve: &Serve, end: Instant) -> anyhow::Result<Vec<Addresses>> {
    let free = SocketAddr::new(serve.listen.ip(), 0);
    let metrics = serve.metrics_listen.unwrap_or(if serve.listen.port() == 0 { free } else { METRICS });
    let mut ports = Ports { taken: Vec::new(), end };
    let broker = |i: u16| {
        let mut clients = |plus, what: &str| ports.take("--listen", serve.listen, plus, &format!("{what} of weir-{i}"));
        let (client, peer, admin) =
            (clients(i * 10, "clients")?, clients(i * 10 + 1, "peers")?, clients(i * 10 + 2, "administrators")?);
        let metrics = ports.take("--metrics-listen", metrics, i, &format!("metrics of weir-{i}"))?;
        Ok(Addresses { name: format!("weir-{i}"), client, peer, admin, metrics })
    };
    (0..serve.brokers).map(broker).collect()
}

/// Takes the folder for this process, for as long as the file is open.
fn take_folder(serve: &Serve, end: Instant) -> anyhow::Result<File> {
    let data = &serve.data;
    std::fs::create_dir_all(data).with_context(|| format!("--data: cannot make the folder {}", data.display()))?;
    let folder = File::open(data).with_context(|| format!("--data: {}", data.display()))?;
    let used = |e: &std::io::Error| e.kind() == ErrorKind::WouldBlock;
    match once_free(end, used, || Ok(folder.try_lock()?)) {
        Ok(()) => {}
        Err(error) if used(&error) => {
            anyhow::bail!(
                "{} is used by another `weir serve`; end that one, or choose another folder with --data",
                data.display()
            )
        }
        Err(error) => return Err(error).with_context(|| format!("--data: {}", data.display())),
    }
    // what one broker left is none of the data of several, which would begin empty
    let holds = |folder: &Path| folder.join("cluster").exists();
    if serve.brokers > 1 && holds(data) {
        anyhow::bail!(
            "{} holds the data of one broker; use --brokers 1, or choose another folder with --data",
            data.display()
        );
    }
    if serve.brokers == 1 && holds(&data.join("weir-0")) {
        anyhow::bail!(
            "{} holds the data of several brokers; use --brokers, or choose another folder with --data",
            data.display()
        );
    }
    Ok(folder)
}

/// Folders whose disks must have room for broker processes, before any is started: each would end without it, and be started again. One
/// broker, in this process, checks its disk itself.
fn roomy_folders(data: &Path, brokers: u16) -> BTreeSet<PathBuf> {
    let own = (0..brokers).filter(|_| brokers > 1).map(|i| data.join(format!("weir-{i}")));
    own.map(|own| if own.exists() { own } else { data.to_owned() }).collect()
}

/// An address by which this machine itself reaches a listener.
fn local(at: SocketAddr) -> SocketAddr {
    match at.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), at.port()),
        IpAddr::V6(ip) if ip.is_unspecified() => SocketAddr::new(Ipv6Addr::LOCALHOST.into(), at.port()),
        _ => at,
    }
}

pub(crate) async fn run(serve: Serve, output: Output) -> anyhow::Result<()> {
    if let Some(folder) = &serve.manifests {
        anyhow::ensure!(folder.is_dir(), "--manifests: {} is not a folder", folder.display());
    }
    if serve.listen.ip().is_unspecified() && serve.advertise_host.is_none() {
        return Err(usage(format!("--listen {}: {}", serve.listen, config::UNREACHABLE)));
    }
    weir_broker::logging::start();
    let end = Instant::now() + FREE_WITHIN;
    let _folder = take_folder(&serve, end)?;
    for folder in roomy_folders(&serve.data, serve.brokers) {
        weir_broker::room::check(&folder).map_err(anyhow::Error::msg)?;
    }
    let list = addresses(&serve, end)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
    };
    let server = list.iter().map(|a| local(a.client).to_string()).collect::<Vec<_>>().join(",");
    if serve.brokers == 1 {
        let config = config(&serve, &list, 0);
        let client = config.advertised(list[0].client);
        let running = weir_broker::start(config).await?;
        running.ready().await;
        let ids = [(list[0].name.clone(), running.broker.0)];
        let printed = print(output, &list, &[client], &[std::process::id()], &ids);
        if printed.is_ok() {
            tokio::spawn(feed(server, serve.manifests, 1));
            stop.await;
        }
        running.stop().await;
        return Ok(printed?);
    }
    let mut brokers = Brokers { serve: &serve, list: &list, running: Vec::new() };
    for at in 0..list.len() {
        brokers.running.push(brokers.spawn(at)?);
    }
    let served = tokio::select! {
        () = stop => None,
        ended = brokers.supervise(&server, output) => Some(ended),
    };
    brokers.stop().await;
    served.unwrap_or(Ok(()))
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
        deadlines: Default::default(),
        peer_listen: me.peer,
        admin_listen: me.admin,
        metrics_listen: me.metrics,
        advertise_host: serve.advertise_host.clone(),
        peers: if many { list.iter().map(|a| format!("{}={}", a.name, local(a.peer))).collect() } else { Vec::new() },
        cluster_id: String::new(),
        connections_max: CONNECTIONS_MAX,
        accept_loss: serve.accept_loss,
        rack: String::new(),
    }
}

/// A broker process. It ends once nothing holds the pipe to it: also where this process is killed.
struct Running {
    child: Child,
    _pipe: Option<ChildStdin>,
    /// how often it was started
    starts: u32,
}

/// The broker processes.
struct Brokers<'a> {
    serve: &'a Serve,
    list: &'a [Addresses],
    running: Vec<Running>,
}

impl Brokers<'_> {
    fn spawn(&self, at: usize) -> anyhow::Result<Running> {
        let config = config(self.serve, self.list, at);
        let program = std::env::current_exe()?;
        let mut command = Command::new(program);
        command.args([BROKER, WITH_PARENT, "--name", &config.name]).arg("--data").arg(&config.data);
        command.args(["--client-listen", &config.client_listen.to_string()]);
        command.args(["--peer-listen", &config.peer_listen.to_string()]);
        command.args(["--admin-listen", &config.admin_listen.to_string()]);
        command.args(["--metrics-listen", &config.metrics_listen.to_string()]);
        command.args(["--peers", &config.peers.join(",")]);
        command.args(config.advertise_host.iter().flat_map(|host| ["--advertise-host", host]));
        command.args(config.accept_loss.iter().flat_map(|write| ["--accept-loss".to_owned(), write.to_string()]));
        let mut child = command.kill_on_drop(true).stdin(Stdio::piped()).spawn()?;
        let pipe = child.stdin.take();
        Ok(Running { child, _pipe: pipe, starts: 1 })
    }

    /// Says once that the cluster answers, and starts brokers again that ended, a second later.
    async fn supervise(&mut self, server: &str, output: Output) -> anyhow::Result<()> {
        let client = |(at, a): (usize, &Addresses)| config(self.serve, self.list, at).advertised(a.client);
        let clients: Vec<String> = self.list.iter().enumerate().map(client).collect();
        let brokers: HashMap<&str, &str> =
            self.list.iter().zip(&clients).map(|(a, client)| (a.name.as_str(), client.as_str())).collect();
        let answered = answer(server, &brokers);
        tokio::pin!(answered);
        let mut answers = false;
        loop {
            tokio::select! {
                cluster = &mut answered, if !answers => {
                    answers = true;
                    let cluster = cluster?;
                    let ids: Vec<(String, u64)> = cluster.metadata.brokers.iter().map(|b| (b.name.clone(), b.id)).collect();
                    let pids: Vec<u32> = self.running.iter().map(|r| r.child.id().unwrap_or(0)).collect();
                    print(output, self.list, &clients, &pids, &ids)?;
                    tokio::spawn(feed(server.to_owned(), self.serve.manifests.clone(), self.serve.brokers));
                }
                () = tokio::time::sleep(Duration::from_millis(200)) => self.restart(answers).await?,
            }
        }
    }

    /// Starts brokers again that ended, but not for ever where none of them has ever served.
    async fn restart(&mut self, answers: bool) -> anyhow::Result<()> {
        for at in 0..self.running.len() {
            let Some(status) = self.running[at].child.try_wait()? else { continue };
            if self.serve.no_restart {
                continue;
            }
            let (name, starts) = (&self.list[at].name, self.running[at].starts + 1);
            let vain = self.running.iter().enumerate().all(|(other, r)| r.starts + u32::from(other == at) > STARTS_MAX);
            anyhow::ensure!(answers || !vain, "no broker comes up ({name}: {status}); their reasons are above");
            note(format_args!("weir: broker {name} ended ({status}); starting it again"));
            tokio::time::sleep(Duration::from_secs(1)).await;
            self.running[at] = Running { starts, ..self.spawn(at)? };
            note(format_args!("weir: broker {name} has pid {}", self.running[at].child.id().unwrap_or(0)));
        }
        Ok(())
    }

    /// Ends them as planned.
    async fn stop(mut self) {
        for pid in self.running.iter().filter_map(|r| r.child.id()) {
            let _ = Command::new("kill").arg("-TERM").arg(pid.to_string()).status().await;
        }
        for running in &mut self.running {
            let _ = tokio::time::timeout(ENDS_WITHIN, running.child.wait()).await;
        }
    }
}

/// The cluster, once it has a metadata leader and names all brokers with these addresses, by name.
async fn answer(server: &str, brokers: &HashMap<&str, &str>) -> anyhow::Result<std::sync::Arc<weir_client::Cluster>> {
    let client = Client::new(server)?;
    let end = tokio::time::Instant::now() + ANSWERS_WITHIN;
    let mut cluster = client.connect(ANSWERS_WITHIN).await.context("the brokers did not come up")?;
    // one whose disk is being rebuilt joins later: the others serve
    let is_named = |b: &&weir_client::proto::Broker| brokers.get(b.name.as_str()) == Some(&b.client_address.as_str());
    let named = |cluster: &weir_client::Cluster| cluster.metadata.brokers.iter().filter(is_named).count();
    while cluster.metadata.controller == 0 || named(&cluster) < brokers.len() {
        let old = weir_proto::rolled_back(&cluster.metadata);
        anyhow::ensure!(
            cluster.metadata.controller != 0 || 2 * old.len() < brokers.len(),
            "the volumes of {} were rolled back to older copies, and without them there is no majority: put their newest folders back, \
             or all folders of one instant at which the cluster was stopped",
            old.join(" and ")
        );
        if tokio::time::Instant::now() >= end {
            let led = cluster.metadata.controller != 0;
            anyhow::ensure!(led, "the brokers run, but elect no leader; their reasons are above");
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        cluster = client.refresh().await.unwrap_or(cluster);
    }
    Ok(cluster)
}

/// A broker of `weir serve --brokers N`, in a process of its own; these are its arguments.
pub(crate) fn broker(mut arguments: Vec<OsString>) -> anyhow::Result<()> {
    if arguments.get(1).is_some_and(|first| first == WITH_PARENT) {
        arguments.remove(1);
        std::thread::spawn(end_with_parent);
    }
    let config = Config::parse_from(arguments);
    let runtime = weir_broker::runtime()?;
    runtime.block_on(runtime.spawn(run_broker(config)))?
}

/// Ends this process once its parent's end of the pipe is closed, however the parent ended.
fn end_with_parent() {
    let mut byte = [0];
    while let Ok(1) = std::io::stdin().read(&mut byte) {}
    note("weir: a broker ends, since the `weir serve` that started it has ended");
    // as by a crash, which the store withstands: an orderly exit would wait for its work in the background
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
}

async fn run_broker(config: Config) -> anyhow::Result<()> {
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

fn print(
    output: Output,
    list: &[Addresses],
    clients: &[String],
    pids: &[u32],
    ids: &[(String, u64)],
) -> Result<(), Unwritten> {
    let pid = |at: usize| pids.get(at).or(pids.first()).copied().unwrap_or(0);
    // 0 for one that has not joined yet
    let id = |name: &str| ids.iter().find(|(n, _)| n == name).map_or(0, |(_, id)| *id);
    if output == Output::Json {
        let broker = |(at, a): (usize, &Addresses)| {
            serde_json::json!({"id": id(&a.name), "name": a.name, "pid": pid(at), "client": clients[at],
                "peer": a.peer.to_string(), "admin": a.admin.to_string(), "metrics": a.metrics.to_string()})
        };
        let brokers: Vec<_> = list.iter().enumerate().map(broker).collect();
        return outln!("{}", serde_json::json!({"brokers": brokers}));
    }
    for (at, a) in list.iter().enumerate() {
        let Addresses { name, admin, metrics, .. } = a;
        let client = &clients[at];
        outln!(
            "broker {} ({name}, pid {}): clients {client}, admin {admin}, metrics http://{metrics}/metrics",
            id(name),
            pid(at)
        )?;
    }
    Ok(())
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
        let (mut declared, mut errors) = Default::default();
        let wrong = match manifest::read_folder(&self.folder, &mut declared, &mut errors) {
            Ok(()) => {
                let mut wrong: BTreeSet<String> = errors.iter().map(ToString::to_string).collect();
                match Client::new(server) {
                    Ok(client) => self.apply(&client, declared, &mut wrong).await,
                    Err(error) => drop(wrong.insert(error.to_string())),
                }
                wrong
            }
            Err(error) => BTreeSet::from([format!("{}: {error}", self.folder.display())]),
        };
        wrong.difference(&self.said).for_each(|text| note(format_args!("weir: {text}")));
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
            topic.spec.replicas = topic.spec.replicas.min(self.brokers.into());
            let (what, text) = (format!("topic {}", topic.name), format!("{topic:?}"));
            if self.applied.get(&what) != Some(&text) {
                match apply_topic(client, &topic).await {
                    Ok(_) => drop(self.applied.insert(what, text)),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_disk_is_checked_once() {
        let data = tempfile::tempdir().unwrap();
        let checked = |brokers| roomy_folders(data.path(), brokers).into_iter().collect::<Vec<_>>();
        assert!(checked(1).is_empty(), "the broker in this process checks it");
        assert_eq!(checked(3), [data.path()]);
        let own = data.path().join("weir-1");
        std::fs::create_dir(&own).unwrap();
        assert_eq!(checked(3), [data.path(), &own]);
    }
}
