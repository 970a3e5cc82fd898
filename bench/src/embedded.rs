//! Brokers in this process, and a client of theirs without a socket.

use anyhow::Context as _;
use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use weir_broker::Running;
use weir_broker::config::Config;
use weir_client::consumer::{From, Message, read_partition};
use weir_client::producer::{Options, Producer};
use weir_client::{Client, Error, Record, proto as v1};

/// One broker, or three; they end with it.
pub struct Embedded {
    runtime: Runtime,
    client: Client,
    _brokers: Vec<Running>,
    _folder: TempDir,
}

impl Embedded {
    /// Starts so many brokers, whose names begin with `name`, with the topics `synced` and `memory` of one partition that all hold.
    pub fn start(name: &str, brokers: usize) -> anyhow::Result<Self> {
        let runtime = weir_broker::runtime()?;
        let folder = tempfile::tempdir()?;
        let free = || -> anyhow::Result<SocketAddr> { Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?) };
        let ports: Vec<SocketAddr> = (0..brokers).map(|_| free()).collect::<anyhow::Result<_>>()?;
        let names: Vec<String> = (0..brokers).map(|at| format!("{name}-{at}")).collect();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let peers: Vec<String> = names.iter().zip(&ports).map(|(name, at)| format!("{name}={at}")).collect();
        let config = |(name, peer_listen): (&String, &SocketAddr)| Config {
            name: name.clone(),
            data: folder.path().join(name),
            client_listen: any,
            client_socket: None,
            inproc: true,
            deadlines: Default::default(),
            peer_listen: *peer_listen,
            admin_listen: any,
            metrics_listen: any,
            advertise_host: None,
            peers: peers.clone(),
            cluster_id: String::new(),
            connections_max: 1_000,
            accept_loss: None,
            rack: String::new(),
        };
        let configs: Vec<Config> = names.iter().zip(&ports).map(config).collect();
        let seeds: Vec<String> = names.iter().map(|name| format!("inproc:{name}")).collect();
        let (running, client) = runtime.block_on(async {
            let running = futures::future::try_join_all(configs.into_iter().map(weir_broker::start)).await?;
            let client = Client::new(&seeds.join(","))?;
            client.connect(Duration::from_secs(20)).await?;
            for (name, quorum_memory) in [("synced", false), ("memory", true)] {
                let spec =
                    v1::TopicSpec { partitions: 1, replicas: brokers as u32, quorum_memory, ..Default::default() };
                let request = v1::ApplyTopicRequest { name: name.into(), spec: Some(spec), ..Default::default() };
                let end = Instant::now() + Duration::from_secs(20);
                // three brokers answer before they have elected who leads them
                while let Err(status) = client.admin().await?.apply_topic(request.clone()).await {
                    anyhow::ensure!(weir_client::is_transient(&status) && Instant::now() < end, status);
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                while client.refresh().await?.leader(name, 0).is_none() {
                    anyhow::ensure!(Instant::now() < end, "topic {name} has no leader");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
            anyhow::Ok((running, client))
        })?;
        Ok(Self { runtime, client, _brokers: running, _folder: folder })
    }

    /// One message in flight, so many times: how long each took until it was acknowledged, or until a reader had it.
    pub fn one_by_one(&self, topic: &'static str, times: u64, until_read: bool) -> anyhow::Result<Vec<Duration>> {
        let client = self.client.clone();
        // on a worker: what it wakes stays on that worker's processor
        self.runtime.block_on(self.runtime.spawn(async move {
            let options = Options { linger: Duration::ZERO, ..Default::default() };
            let producer = Producer::open(&client, topic, options).await?;
            let (sender, mut reader) = mpsc::channel::<Result<Vec<Message>, Error>>(64);
            if until_read {
                tokio::spawn(read_partition(client, topic.to_owned(), 0, From::Latest, false, sender));
                tokio::time::sleep(Duration::from_millis(500)).await; // it reads on from where the topic ended when it began
            }
            let mut took = Vec::new();
            for at in 0..times + 100 {
                let record = Record { value: Some(vec![b'x'; 100].into()), timestamp_ms: 1, ..Default::default() };
                let begun = Instant::now();
                let receipt = producer.send_to(0, record).await?;
                if until_read {
                    reader.recv().await.context("the reader ended")??;
                } else {
                    receipt.await?;
                }
                if at >= 100 {
                    took.push(begun.elapsed()); // the first are for warming up
                }
            }
            Ok(took)
        }))?
    }
}
