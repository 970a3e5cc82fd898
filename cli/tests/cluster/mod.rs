//! `weir serve` with one or three brokers, as processes of the test's own, and what is declared in it.

#![allow(dead_code)] // each test program uses a part

pub(crate) mod net;
pub(crate) mod power;
pub(crate) mod writer;

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use weir_client::consumer::{From, Message, read_partition};
use weir_client::transport::Transport;
use weir_client::{Client, Error};
use weir_proto::v1;
use weir_proto::v1::admin_client::AdminClient;

/// What takes moments takes no longer, also beside a compiler.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) const WEIR: &str = env!("CARGO_BIN_EXE_weir");

/// One cluster at a time: failover is measured.
static TURN: Mutex<()> = Mutex::new(());

pub(crate) struct Cluster {
    _turn: std::sync::MutexGuard<'static, ()>,
    serve: Child,
    pub(crate) servers: String,
    metrics: Vec<String>,
    brokers: u32,
    pub(crate) data: tempfile::TempDir,
}

impl Cluster {
    pub(crate) fn start(brokers: u32) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), brokers)
    }

    pub(crate) fn start_in(data: tempfile::TempDir, brokers: u32) -> Self {
        Self::start_with(data, brokers, |serve| {
            serve.args(["--listen", "127.0.0.1:0"]);
        })
    }

    /// With more arguments and variables for `weir serve`.
    fn start_with(data: tempfile::TempDir, brokers: u32, more: impl FnOnce(&mut Command)) -> Self {
        let turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut serve = serve(data.path(), brokers);
        more(&mut serve);
        let mut serve = serve.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(serve.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let said: serde_json::Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"));
        let list = said["brokers"].as_array().unwrap().clone();
        let servers: Vec<&str> = list.iter().map(|b| b["client"].as_str().unwrap()).collect();
        let metrics = list.iter().map(|b| b["metrics"].as_str().unwrap().to_owned()).collect();
        Self { _turn: turn, serve, servers: servers.join(","), metrics, brokers, data }
    }

    /// The metrics of a broker, as Prometheus reads them.
    pub(crate) async fn metrics(&self, at: usize) -> String {
        self.get(at, "/metrics").await
    }

    /// What a broker's HTTP server answers, with its status line.
    pub(crate) async fn get(&self, at: usize, path: &str) -> String {
        self.try_get(at, path).await.unwrap()
    }

    /// As [`Self::get`], of a broker that may not run just now.
    pub(crate) async fn try_get(&self, at: usize, path: &str) -> std::io::Result<String> {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = tokio::net::TcpStream::connect(&self.metrics[at]).await?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok(text)
    }

    /// Pid of a broker by name.
    pub(crate) fn pid(&self, name: &str) -> Option<i32> {
        pid_of(&self.data.path().join(name))
    }

    pub(crate) fn kill(&self, name: &str) {
        self.signal(name, "-KILL");
    }

    /// Kills a broker and does something before it is started again.
    pub(crate) fn kill_and<T>(&self, name: &str, meanwhile: impl FnOnce() -> T) -> T {
        let pid = self.pid(name).expect("the broker runs").to_string();
        let starter = self.serve.id().to_string();
        send(&starter, "-STOP");
        send(&pid, "-KILL");
        while runs(&pid) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let done = meanwhile();
        send(&starter, "-CONT");
        done
    }

    /// Sends a signal to a broker, a process of this test's own.
    pub(crate) fn signal(&self, name: &str, signal: &str) {
        send(&self.pid(name).expect("the broker runs").to_string(), signal);
    }

    /// Waits until a broker runs in another process than this one.
    pub(crate) async fn started_again(&self, name: &str, before: Option<i32>) {
        until("another process", async || match self.pid(name) {
            now if now.is_some() && now != before => Ok(()),
            now => Err(now),
        })
        .await;
    }

    /// Everything is killed, first what would start brokers again.
    pub(crate) fn kill_all(mut self) -> Down {
        let pids: Vec<i32> = ["weir-0", "weir-1", "weir-2"].iter().filter_map(|name| self.pid(name)).collect();
        let _ = self.serve.kill();
        let _ = self.serve.wait();
        for name in ["weir-0", "weir-1", "weir-2"] {
            // they end with what started them: one may have done so by now
            if let Some(pid) = self.pid(name) {
                let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).stderr(Stdio::null()).status();
            }
        }
        let started = |name: &&str| self.pid(name).is_some();
        while ["weir-0", "weir-1", "weir-2"].iter().any(started) || pids.iter().any(|pid| runs(&pid.to_string())) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let port = self.servers.split([':', ',']).nth(1).unwrap().parse().unwrap();
        let data = std::mem::replace(&mut self.data, tempfile::tempdir().unwrap());
        Down { data, port, brokers: self.brokers }
    }

    pub(crate) fn stop(mut self) -> tempfile::TempDir {
        send(&self.serve.id().to_string(), "-TERM");
        self.serve.wait().unwrap();
        std::mem::replace(&mut self.data, tempfile::tempdir().unwrap())
    }
}

fn send(pid: &str, signal: &str) {
    assert!(Command::new("kill").args([signal, pid]).status().unwrap().success());
}

/// `weir serve` in a folder.
fn serve(data: &Path, brokers: u32) -> Command {
    let mut serve = Command::new(WEIR);
    serve.args(["serve", "-o", "json", "--brokers", &brokers.to_string()]);
    serve.arg("--data").arg(data).env("WEIR_LOG", "warn").stdout(Stdio::piped());
    serve
}

/// Pid of the broker of a folder, as the process list has it: a restarted one has another than was printed.
pub(crate) fn pid_of(folder: &Path) -> Option<i32> {
    let wanted = folder.to_str().unwrap();
    std::fs::read_dir("/proc").unwrap().find_map(|entry| {
        let entry = entry.ok()?;
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        line.split(|b| *b == 0).any(|arg| arg == wanted.as_bytes()).then_some(pid)
    })
}

/// Bytes of the files in a folder and in those below it.
pub(crate) fn disk_bytes(folder: &Path) -> u64 {
    let Ok(list) = std::fs::read_dir(folder) else { return 0 };
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(data) if data.is_dir() => disk_bytes(&entry.path()),
        Ok(data) => data.len(),
        Err(_) => 0, // it was removed meanwhile
    };
    list.flatten().map(size).sum()
}

/// Whether a process of this pid runs: one that has ended and was not waited for does not, once all its threads have let go of what it
/// had open.
pub(crate) fn runs(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let has_ended = stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('Z'));
    let threads = || std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    !has_ended || threads() > 1
}

/// A port for the first broker's clients where three brokers can listen, 40 ports before their metrics. It is given to no other test of
/// this program, and lies below those that the system gives to connections: nobody takes it while a broker is not running.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let free = |port: u16| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok();
    let all = |port: &u16| (0..3).all(|b| (0..3).all(|p| free(port + 10 * b + p)) && free(port + 40 + b));
    let first = (std::process::id() % 200) as u16;
    let next = || 20_000 + 50 * (first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % 200);
    std::iter::repeat_with(next).find(all).unwrap()
}

/// Brokers that do not run, with their data and ports.
pub(crate) struct Down {
    pub(crate) data: tempfile::TempDir,
    port: u16,
    brokers: u32,
}

impl Down {
    /// A cluster that was never started.
    pub(crate) fn new() -> Self {
        Self::of(3)
    }

    /// The same with so many brokers, three at most.
    pub(crate) fn of(brokers: u32) -> Self {
        Self { data: tempfile::tempdir().unwrap(), port: free_port(), brokers }
    }

    /// Starts it, at the same ports each time.
    pub(crate) fn start(self, more: impl FnOnce(&mut Command)) -> Cluster {
        let addresses = self.addresses();
        Cluster::start_with(self.data, self.brokers, |serve| {
            serve.args(addresses);
            more(serve);
        })
    }

    /// Starts it where it does not come up: what it says on standard error until it ends.
    pub(crate) fn refused(&self) -> String {
        let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut serve = serve(self.data.path(), self.brokers);
        let serve = serve.args(self.addresses()).stderr(Stdio::piped()).spawn().unwrap();
        // where it comes up all the same, it is ended, and its brokers with it
        let (pid, (ended, waiting)) = (serve.id().to_string(), std::sync::mpsc::channel::<()>());
        std::thread::spawn(move || {
            if waiting.recv_timeout(2 * PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                let _ = Command::new("kill").args(["-KILL", &pid]).status();
            }
        });
        let output = serve.wait_with_output().unwrap();
        drop(ended);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{said}");
        said
    }

    fn addresses(&self) -> [String; 2] {
        [format!("--listen=127.0.0.1:{}", self.port), format!("--metrics-listen=127.0.0.1:{}", self.port + 40)]
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for name in ["weir-0", "weir-1", "weir-2"] {
            if let Some(pid) = self.pid(name) {
                let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
            }
        }
        let _ = self.serve.kill();
        let _ = self.serve.wait();
    }
}

/// A cluster with a topic `t` of one partition, of which each broker has a replica.
pub(crate) async fn start(brokers: u32) -> (Cluster, Client) {
    let cluster = Cluster::start(brokers);
    let client = Client::new(&cluster.servers).unwrap();
    make_topic(&client, "t", 1, brokers).await;
    (cluster, client)
}

pub(crate) async fn make_topic(client: &Client, name: &str, partitions: u32, replicas: u32) {
    make_topic_of(client, name, v1::TopicSpec { partitions, replicas, ..Default::default() }).await;
}

pub(crate) async fn make_topic_of(client: &Client, name: &str, spec: v1::TopicSpec) {
    client.connect(PATIENCE).await.unwrap();
    let request = v1::ApplyTopicRequest { name: name.to_owned(), spec: Some(spec), ..Default::default() };
    change(client, async |mut admin| admin.apply_topic(request.clone()).await).await.unwrap();
    until("the topic has leaders", async || {
        let cluster = client.refresh().await.map_err(|e| e.to_string())?;
        let topic = cluster.topic(name);
        if topic.is_some_and(|t| t.partitions.iter().all(|p| p.leader != 0)) {
            Ok(())
        } else {
            Err(format!("{topic:?}"))
        }
    })
    .await;
}

/// Makes an administrative call, again while no metadata leader takes it; afterwards this client knows what it changed. Brokers that were
/// not asked may hear of it a moment later.
pub(crate) async fn change(
    client: &Client,
    call: impl AsyncFn(AdminClient<Transport>) -> Result<tonic::Response<v1::ApplyResponse>, tonic::Status>,
) -> Result<(), Error> {
    let end = Instant::now() + PATIENCE;
    let version = loop {
        match client.admin().await {
            Ok(admin) => match call(admin).await {
                Ok(applied) => break applied.into_inner().version,
                Err(status) if status.code() == tonic::Code::Unavailable && Instant::now() < end => {}
                Err(status) => return Err(status.into()),
            },
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    client.refresh_to(version, PATIENCE).await.map(drop)
}

/// The cluster as a broker knows it now, however long it takes to answer.
pub(crate) async fn refreshed(client: &Client) -> Arc<weir_client::Cluster> {
    client.connect(PATIENCE).await.unwrap()
}

/// A subscription from the beginning, with its position in every partition.
pub(crate) async fn make_subscription(client: &Client, name: &str, topic: &str, mode: v1::SubscriptionMode) {
    subscribe(client, name, spec(topic, mode)).await.unwrap();
}

/// A subscription from the beginning.
pub(crate) fn spec(topic: &str, mode: v1::SubscriptionMode) -> v1::SubscriptionSpec {
    v1::SubscriptionSpec { topic: topic.into(), from_earliest: true, mode: mode.into(), ..Default::default() }
}

/// Declares a subscription.
pub(crate) async fn subscribe(client: &Client, name: &str, spec: v1::SubscriptionSpec) -> Result<(), Error> {
    let request = v1::ApplySubscriptionRequest { name: name.into(), spec: Some(spec), ..Default::default() };
    change(client, async |mut admin| admin.apply_subscription(request.clone()).await).await
}

/// Deletes a topic.
pub(crate) async fn delete_topic(client: &Client, name: &str) {
    let request = v1::DeleteRequest { name: name.into(), ..Default::default() };
    change(client, async |mut admin| admin.delete_topic(request.clone()).await).await.unwrap();
}

/// Deletes a subscription.
pub(crate) async fn delete_subscription(client: &Client, name: &str) {
    let request = v1::DeleteRequest { name: name.into(), ..Default::default() };
    change(client, async |mut admin| admin.delete_subscription(request.clone()).await).await.unwrap();
}

/// Messages of a subscription that are not acknowledged, once the leaders of all partitions of these topics have said so: one that takes
/// long to answer says nothing, which is not none.
pub(crate) async fn backlog(client: &Client, subscription: &str, topics: &[&str]) -> u64 {
    let full = weir_client::full_name(subscription);
    let left = Mutex::new(0);
    until("all leaders say how much is left", async || {
        let cluster = refreshed(client).await;
        let partitions = topics.iter().map(|t| cluster.topic(t).map_or(0, |t| t.partitions.len())).sum::<usize>();
        let names: Vec<String> = topics.iter().map(|t| (*t).to_owned()).collect();
        let statuses = client.describe(&names).await.map_err(|e| e.to_string())?;
        let of_each = statuses.iter().filter_map(|p| p.subscriptions.iter().find(|s| s.subscription == full));
        let of_each: Vec<u64> = of_each.map(|s| s.backlog).collect();
        *left.lock().unwrap() = of_each.iter().sum();
        if of_each.len() == partitions { Ok(()) } else { Err(format!("{} of {partitions}", of_each.len())) }
    })
    .await;
    left.into_inner().unwrap()
}

/// What the command line prints; it must succeed.
pub(crate) fn weir(cluster: &Cluster, args: &[&str]) -> String {
    let run = || Command::new(WEIR).args(args).env("WEIR_SERVER", &cluster.servers).output().unwrap();
    let mut output = run();
    // the metadata's leader may be the one that was killed: whoever changes something asks again
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        if output.status.success() || !String::from_utf8_lossy(&output.stderr).contains("metadata leader") {
            break;
        }
        std::thread::sleep(Duration::from_millis(200));
        output = run();
    }
    assert!(output.status.success(), "weir {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// All messages of a topic, partition by partition, from the beginning to where it ends now.
pub(crate) async fn read_all(client: &Client, topic: &str, partitions: u32) -> Vec<Message> {
    let mut out = Vec::new();
    for partition in 0..partitions {
        read(client, topic, partition, |message| out.push(message)).await;
    }
    out
}

/// The messages of a partition, one after the other, from the beginning to where it ends now.
async fn read(client: &Client, topic: &str, partition: u32, mut take: impl FnMut(Message)) {
    let (mut from, end) = (From::Earliest, Instant::now() + PATIENCE);
    loop {
        let (sender, mut receiver) = tokio::sync::mpsc::channel(16);
        tokio::spawn(read_partition(client.clone(), topic.to_owned(), partition, from, true, sender));
        let mut ended = Ok(());
        while let Some(read) = receiver.recv().await {
            match read {
                Ok(messages) => messages.into_iter().for_each(|message| {
                    from = From::Offset(message.offset + 1);
                    take(message);
                }),
                Err(error) => ended = Err(error),
            }
        }
        match ended {
            Ok(()) => return,
            // brokers that were killed may take longer to come back than a call waits
            Err(Error::Deadline { .. }) if Instant::now() < end => {}
            Err(error) => panic!("{topic}/{partition}: {error}"),
        }
    }
}

/// Asks until it is so; says what was seen last where it never is.
pub(crate) async fn until<T: std::fmt::Debug>(what: &str, ask: impl AsyncFn() -> Result<(), T>) {
    let end = Instant::now() + PATIENCE;
    loop {
        match ask().await {
            Ok(()) => return,
            Err(seen) => assert!(Instant::now() < end, "{what}: {seen:?}"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Asks until the answer is the one that is wanted.
pub(crate) async fn until_is<T: std::fmt::Debug + PartialEq>(what: &str, wanted: T, ask: impl AsyncFn() -> T) {
    until(what, async || match ask().await {
        seen if seen == wanted => Ok(()),
        seen => Err(seen),
    })
    .await;
}

/// Waits until all partitions of a topic have so many replicas, each with all of it.
pub(crate) async fn in_sync(client: &Client, topic: &str, replicas: usize) {
    until("all replicas in sync", async || {
        let seen = client.describe(&[topic.to_owned()]).await.map_err(|e| e.to_string())?;
        let whole = |p: &v1::PartitionStatus| p.replicas.iter().filter(|r| r.in_sync && r.voter).count() == replicas;
        let settled = client
            .refresh()
            .await
            .is_ok_and(|c| c.topic(topic).is_some_and(|t| t.partitions.iter().all(|p| p.settled)));
        if settled && !seen.is_empty() && seen.iter().all(whole) { Ok(()) } else { Err(format!("{seen:?}")) }
    })
    .await;
}
